"use strict";
// Exchanges the key for a session. The address that `phinetune serve` prints has the key behind its #, which browsers
// send nowhere.
(() => {
  const form = document.getElementById("sign-in");

  async function signIn(key) {
    await page.send("POST", "/session", { key });
    location.replace("/page/data");
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    page.busy(form.querySelector("button"), () => signIn(form.elements.key.value.trim()));
  });
  const given = location.hash.startsWith("#key=") ? decodeURIComponent(location.hash.slice("#key=".length)) : "";
  if (given) {
    history.replaceState(null, "", "/");
    page.busy(form.querySelector("button"), () => signIn(given));
  }
})();
