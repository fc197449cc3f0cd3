"use strict";
// Starts exports; the list under the forms shows how they go.
(() => {
  const model = document.getElementById("model");

  function body(form) {
    const fields = form.elements, made = { model: model.value, target: form.dataset.target };
    if (fields.type) made.type = fields.type.value;
    if (fields.repo) {
      Object.assign(made, { repo: fields.repo.value.trim(), private: fields.private.checked, merged: fields.merged.checked });
    }
    return made;
  }

  for (const form of document.querySelectorAll("form.export")) {
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (form.dataset.target === "push" && !confirm(page.say("hand.ask_push", { repo: form.elements.repo.value }))) return;
      page.busy(form.querySelector("button"), async () => {
        await page.send("POST", "/phinetune/exports", body(form));
        await page.renew(document.getElementById("exports"));
        document.getElementById("made").scrollIntoView({ block: "nearest" });
      });
    });
  }
})();
