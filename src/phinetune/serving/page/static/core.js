"use strict";
// What all pages share: requests with the page's token, errors in words, and pieces of the page that renew themselves.
const page = (() => {
  const words = JSON.parse(document.getElementById("words").textContent);
  const token = document.querySelector('meta[name="csrf-token"]').content;
  const message = document.getElementById("message");
  const shown = new WeakMap(); // part -> the HTML that it shows

  const say = (key, values = {}) => words[key].replace(/\{(\w+)\}/g, (all, name) => values[name] ?? all);

  // What is wrong in the page's language, if it has words for it, above the server's own sentence.
  function inWords({ message, code, type, kind }) {
    const key = [code, kind, type].find((one) => words[`problem.${one}`] || words[`finding.${one}`]);
    const own = words[`problem.${key}`] ?? (key && `${words[`finding.${key}`]}。${words[`advice.${key}`]}。`);
    return own ? `${own}\n${message}` : message;
  }

  class Refused extends Error {
    constructor(text, details = {}) {
      super(text);
      this.details = details;
    }
  }

  // A request to this page's own server. A body is sent as JSON, or as the form that it is.
  async function send(method, url, body, signal) {
    const headers = { "X-CSRF-Token": token };
    const isForm = body instanceof FormData;
    if (body !== undefined && !isForm) headers["Content-Type"] = "application/json";
    let answer;
    try {
      answer = await fetch(url, { method, headers, signal, body: isForm || body === undefined ? body : JSON.stringify(body) });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused(say("error.away"));
    }
    if (answer.ok) return answer;
    if (answer.status === 401 && token) location.assign("/");
    const told = await answer.json().catch(() => ({}));
    const text = told.error ? inWords(told.error) : say("error.status", { status: answer.status });
    throw new Refused(text, told.error);
  }

  function tell(text) {
    message.querySelector("p").textContent = text;
    message.hidden = !text;
    if (text) message.scrollIntoView({ block: "nearest" });
  }

  // Does something for a button, once at a time, and tells what went wrong.
  async function busy(button, work) {
    if (button.hasAttribute("aria-busy")) return; // it is not disabled: then it would lose the focus
    button.setAttribute("aria-busy", "true");
    tell("");
    try {
      await work();
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      tell(error.message);
    } finally {
      button.removeAttribute("aria-busy");
    }
  }

  // Puts new HTML into a part. What was open stays open, and what had the focus has it again.
  function fill(part, html) {
    if (shown.get(part) === html) return;
    const focus = part.contains(document.activeElement) ? document.activeElement.id : "";
    const open = [...part.querySelectorAll("details[id][open]")].map((one) => one.id);
    shown.set(part, html);
    part.innerHTML = html;
    for (const id of open) part.querySelector(`#${CSS.escape(id)}`)?.setAttribute("open", "");
    if (focus) document.getElementById(focus)?.focus({ preventScroll: true });
    part.dispatchEvent(new CustomEvent("renewed", { bubbles: true }));
  }

  async function renew(part) {
    const url = part.dataset.part;
    part.setAttribute("aria-busy", "true");
    try {
      const html = await (await send("GET", url)).text();
      if (part.dataset.part === url) fill(part, html);
      if (message.textContent.includes(say("error.away"))) tell("");
      return true;
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      if (!part.hasAttribute("data-here")) {
        part.replaceChildren(element("p", error.message, "flag"));
      } else tell(error.message);
      return false;
    } finally {
      part.removeAttribute("aria-busy");
    }
  }

  function keepRenewing(part) {
    const every = Number(part.dataset.every);
    const later = async () => {
      if (part.querySelector("[data-done]")) return;
      const went = document.hidden || (await renew(part));
      setTimeout(later, went ? every : 5 * every);
    };
    setTimeout(later, every);
  }

  const renewAll = () => Promise.all([...document.querySelectorAll("[data-part]")].map(renew));

  function element(tag, text, className) {
    const made = document.createElement(tag);
    made.textContent = text;
    if (className) made.className = className;
    return made;
  }

  async function call(button) {
    if (button.dataset.ask && !confirm(button.dataset.ask)) return;
    const [method, url] = button.dataset.call.split(" ");
    await busy(button, async () => {
      await send(method, url);
      if (button.dataset.then) location.assign(button.dataset.then);
      else await renewAll();
    });
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.dataset.call) call(button);
    else if (button.dataset.show) {
      const part = button.closest("[data-part]");
      part.dataset.part = button.dataset.show;
      busy(button, () => renew(part));
    } else if (button.dataset.language) {
      document.cookie = `phinetune_language=${button.dataset.language}; Path=/; SameSite=Strict; Max-Age=31536000`;
      location.reload();
    } else if (button.id === "sign-out") {
      busy(button, async () => {
        await send("DELETE", "/session");
        location.assign("/");
      });
    } else if (message.contains(button)) tell("");
  });

  if (token && location.hash.startsWith("#key=")) history.replaceState(null, "", location.pathname + location.search);
  for (const part of document.querySelectorAll("[data-part]")) {
    if (!part.hasAttribute("data-here")) renew(part);
    if (part.dataset.every) keepRenewing(part);
  }
  return { say, inWords, send, tell, busy, fill, renew, renewAll, element, Refused };
})();
