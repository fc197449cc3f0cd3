"use strict";
// Asks a model for an answer to a conversation, and gives its text as it comes.
const stream = (() => {
  // The data of each event of a stream, which may come in pieces of any size.
  async function* events(body) {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    for (let held = ""; ; ) {
      const { value, done } = await reader.read();
      if (done) return;
      held += value;
      for (let end; (end = held.indexOf("\n\n")) >= 0; held = held.slice(end + 2)) {
        const lines = held.slice(0, end).split("\n").filter((line) => line.startsWith("data: "));
        if (lines.length) yield lines.map((line) => line.slice(6)).join("\n");
      }
    }
  }

  // Returns why the answer ended: `stop`, or `length` where it was cut.
  async function answer(asked, onText, signal) {
    const reply = await page.send("POST", "/v1/chat/completions", { ...asked, stream: true }, signal);
    let reason = "";
    for await (const data of events(reply.body)) {
      if (data === "[DONE]") break;
      const part = JSON.parse(data);
      if (part.error) throw new page.Refused(page.inWords(part.error), part.error);
      const choice = part.choices[0];
      if (choice?.delta?.content) onText(choice.delta.content);
      reason = choice?.finish_reason ?? reason;
    }
    return reason;
  }
  return { answer };
})();
