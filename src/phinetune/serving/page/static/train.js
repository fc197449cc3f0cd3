"use strict";
// Makes the body of a job of the form, has it planned, and starts it.
(() => {
  const form = document.getElementById("train");
  if (!form) return;
  const NUMBERS = ["n_epochs", "batch_size", "learning_rate_multiplier", "beta"];
  const plan = document.getElementById("plan"), planned = document.getElementById("planned");
  const fields = form.elements;

  const isPairs = () => fields.training_file.selectedOptions[0]?.dataset.form === "preference";

  function body() {
    const kind = isPairs() ? "dpo" : "supervised";
    const wanted = NUMBERS.filter((name) => name !== "beta" || isPairs());
    const numbers = wanted.map((name) => [name, fields[name].value === "" ? "auto" : Number(fields[name].value)]);
    const made = {
      model: fields.model.value,
      training_file: fields.training_file.value,
      method: { type: kind, [kind]: { hyperparameters: Object.fromEntries(numbers) } },
    };
    for (const name of ["validation_file", "suffix"]) if (fields[name].value) made[name] = fields[name].value;
    if (fields.seed.value !== "") made.seed = Number(fields.seed.value);
    return made;
  }

  // What a plan chose in place of `auto` is shown beside each setting.
  function showChosen(numbers) {
    for (const place of form.querySelectorAll("[data-chosen]")) {
      const value = numbers[place.dataset.chosen];
      const isAuto = fields[place.dataset.chosen].value === "";
      place.textContent = value !== undefined && isAuto ? page.say("train.chosen", { value }) : "";
    }
  }

  function forget() {
    plan.hidden = true;
    showChosen({});
    document.getElementById("method").textContent = page.say(isPairs() ? "train.pairs" : "train.chats");
    fields.beta.closest(".setting").hidden = !isPairs();
    for (const option of fields.validation_file.options) {
      const fits = !option.value || (option.dataset.form === "preference") === isPairs();
      option.disabled = !fits || option.value === fields.training_file.value;
      if (option.disabled && option.selected) fields.validation_file.value = "";
    }
  }

  document.getElementById("plan-it").addEventListener("click", (event) => {
    if (!form.reportValidity()) return;
    page.busy(event.currentTarget, async () => {
      const working = plan.querySelector(".working");
      planned.replaceChildren();
      plan.hidden = working.hidden = false;
      try {
        page.fill(planned, await (await page.send("POST", "/phinetune/parts/plan", body())).text());
        showChosen(JSON.parse(planned.querySelector("[data-numbers]").dataset.numbers));
      } catch (error) {
        plan.hidden = true;
        throw error;
      } finally {
        working.hidden = true;
      }
    });
  });

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    page.busy(document.getElementById("start"), async () => {
      const job = await (await page.send("POST", "/v1/fine_tuning/jobs", body())).json();
      location.assign(`/page/jobs/${job.id}`);
    });
  });
  form.addEventListener("change", forget);
  forget();
})();
