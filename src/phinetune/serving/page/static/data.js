"use strict";
// Uploads a file that was chosen or dropped, and shows its mistakes line by line; keeps rows of a file aside.
(() => {
  const split = document.getElementById("split");
  split?.addEventListener("click", () =>
    page.busy(split, async () => {
      const made = await (await page.send("POST", `/phinetune/files/${split.dataset.file}/split`, {})).json();
      location.assign(`/page/train?file=${made.training_file}&held_out=${made.validation_file}`);
    }),
  );

  const drop = document.getElementById("drop");
  if (!drop) return;
  const input = document.getElementById("file");
  const working = document.getElementById("uploading");
  const problems = document.getElementById("problems");

  function showProblems(error) {
    const lines = error.details.lines ?? [];
    if (!lines.length) return page.tell(error.message);
    const rows = lines.map((one) => {
      const row = document.createElement("tr");
      row.append(page.element("td", one.line, "number"), page.element("td", page.inWords(one), "long"));
      return row;
    });
    problems.querySelector("tbody").replaceChildren(...rows);
    problems.querySelector(".hint").textContent = page.say("data.refused_about", { many: error.details.count });
    problems.hidden = false;
    problems.scrollIntoView({ block: "nearest" });
  }

  async function upload(file) {
    if (!file || !working.hidden) return;
    const form = new FormData();
    form.append("purpose", "fine-tune");
    form.append("file", file, file.name);
    page.tell("");
    problems.hidden = true;
    working.hidden = false;
    try {
      const kept = await (await page.send("POST", "/v1/files", form)).json();
      location.assign(`/page/files/${kept.id}`);
    } catch (error) {
      if (!(error instanceof page.Refused)) throw error;
      showProblems(error);
    } finally {
      working.hidden = true;
      input.value = "";
    }
  }

  input.addEventListener("change", () => upload(input.files[0]));
  for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault(); // a file that is dropped beside the box would take the page's place
      drop.classList.toggle("over", kind === "dragenter" || kind === "dragover");
    });
  }
  document.addEventListener("drop", (event) => upload(event.dataTransfer.files[0]));
})();
