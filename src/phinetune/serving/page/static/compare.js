"use strict";
// Asks two models the same at the same time, shows both answers as they come, and takes a vote.
(() => {
  const form = document.getElementById("prompt-form"), voting = document.getElementById("voting");
  const ask = document.getElementById("ask"), stop = document.getElementById("stop");
  const sides = ["left", "right"].map((name) => {
    const box = document.getElementById(name);
    return { name, box, model: box.querySelector("select"), text: box.querySelector(".text"), hint: box.querySelector(".hint") };
  });
  const blind = document.getElementById("blind");
  let running = null, compared = null; // what the votes are about: messages, and a model and an answer for each side

  function conversation() {
    const system = form.elements.system.value.trim();
    const turns = [{ role: "user", content: form.elements.prompt.value }];
    return system ? [{ role: "system", content: system }, ...turns] : turns;
  }

  // Who answers on which side: as chosen, or under `blind` by chance.
  function placed() {
    const models = sides.map((side) => side.model.value);
    return blind.checked && Math.random() < 0.5 ? models.reverse() : models;
  }

  async function answerOn(side, model, messages, signal) {
    const began = performance.now();
    let text = "";
    side.text.textContent = "";
    side.hint.textContent = page.say("compare.waiting");
    side.box.classList.add("working-side");
    try {
      const asked = {
        model,
        messages,
        temperature: Number(form.elements.temperature.value),
        max_tokens: Number(form.elements.max_tokens.value),
      };
      const reason = await stream.answer(asked, (piece) => {
        if (!text) side.hint.textContent = "";
        side.text.textContent = text += piece;
      }, signal);
      const seconds = ((performance.now() - began) / 1000).toFixed(1);
      const ended = page.say(reason === "length" ? "compare.cut" : "compare.took", { seconds });
      side.hint.textContent = text ? ended : page.say("compare.empty", { seconds });
    } catch (error) {
      side.hint.textContent = error.name === "AbortError" ? page.say("compare.stopped") : "";
      if (error.name !== "AbortError") throw error;
    } finally {
      side.box.classList.remove("working-side");
    }
    return { model, content: text };
  }

  async function compare() {
    const messages = conversation(), models = placed();
    running = new AbortController();
    compared = null;
    voting.disabled = true;
    stop.hidden = false;
    for (const side of sides) side.box.classList.toggle("hidden-name", blind.checked);
    try {
      const asked = sides.map((side, i) => answerOn(side, models[i], messages, running.signal));
      const [left, right] = await Promise.all(asked.map((one) => one.catch((error) => {
        running.abort();
        throw error;
      })));
      if (running.signal.aborted) return;
      compared = { messages, left, right };
      voting.disabled = false;
      const told = left.content === right.content ? "compare.same" : "compare.done";
      document.getElementById("compared").textContent = page.say(told);
      for (const button of voting.querySelectorAll("button")) {
        const needs = { left: left.content, right: right.content, equal: left.content && right.content }[button.dataset.vote];
        button.disabled = !needs || (button.dataset.vote !== "equal" && (left.content === right.content || !left.content || !right.content));
      }
    } finally {
      stop.hidden = true;
    }
  }

  async function vote(choice) {
    const { messages, left, right } = compared;
    const [preferred, other] = choice === "right" ? [right, left] : [left, right];
    await page.send("POST", "/phinetune/votes", { messages, preferred, other, equal: choice === "equal" });
    voting.disabled = true;
    if (blind.checked) sides.forEach((side, i) => (side.hint.textContent = page.say("compare.was", { model: [left, right][i].model })));
    for (const side of sides) side.box.classList.remove("hidden-name");
    await page.renew(document.getElementById("votes"));
    document.getElementById("compared").textContent = page.say("vote.kept");
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    page.busy(ask, compare);
  });
  form.elements.prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  stop.addEventListener("click", () => running?.abort());
  voting.addEventListener("click", (event) => {
    const choice = event.target.dataset.vote;
    if (choice && compared) page.busy(event.target, () => vote(choice));
  });
  document.getElementById("votes").addEventListener("click", (event) => {
    if (event.target.id !== "make-file") return;
    page.busy(event.target, async () => {
      const made = await (await page.send("POST", "/phinetune/votes/file")).json();
      const tuned = sides[1].model.value;
      location.assign(`/page/train?file=${made.file}&model=${encodeURIComponent(tuned)}`);
    });
  });
})();
