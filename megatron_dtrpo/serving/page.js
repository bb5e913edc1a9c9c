// A column a checkpoint: the response as it is unmasked, then a slider over its steps.
const models = JSON.parse($("data").textContent);
let running = null;  // aborts the requests that are being answered

class Column {
  constructor(name) {
    this.name = name;
    this.element = $("column").content.firstElementChild.cloneNode(true);
    this.part("h2").textContent = name;
    this.part(".replay").addEventListener("input", () => this.show(+this.part(".replay").value));
    $("columns").append(this.element);
  }

  part(selector) { return this.element.querySelector(selector); }

  clear() {
    this.done = [];  // tokens of finished blocks, [text, confidence] each
    this.spans = [];
    this.trace = null;
    this.part(".completion").replaceChildren();
    this.part(".replay").disabled = true;
    this.part(".replay").value = this.part(".replay").max = 0;
    for (const name of ["passes", "tokens", "rate", "seconds"]) this.part("." + name).textContent = "\u2013";
    this.say("waits for a slot");
  }

  say(words, isError = false) {
    this.part(".status").textContent = words;
    this.part(".status").classList.toggle("error", isError);
  }

  async run(body, headers, signal) {
    this.clear();
    try {
      const answer = await fetch("watch", { method: "POST", headers, signal,
                                            body: JSON.stringify({ ...body, model: this.name }) });
      if (answer.status === 401) $("key-choice").hidden = false;
      if (!answer.ok) throw new Error((await answer.json()).error.message);
      for await (const event of eventsOf(answer)) this.take(event);
      if (!this.trace) throw new Error("the connection ended early");
    } catch (error) {
      const words = error instanceof TypeError ? "the server does not answer" : error.message;  // fetch's
      this.say(signal.aborted ? "stopped" : words, !signal.aborted);
    }
  }

  take(event) {
    if (event.error) throw new Error(event.error.message);
    if (event.trace) this.finish(event.trace);
    else {
      this.say("writes");
      if (event.written) this.done = event.written;
      this.draw([...this.done.slice(0, event.start), ...(event.block ?? [])]);
    }
    this.part(".passes").textContent = event.passes;
    this.part(".tokens").textContent = this.count;
    this.part(".rate").textContent = (this.count / event.passes).toFixed(2);
    this.part(".seconds").textContent = event.seconds.toFixed(event.seconds < 1 ? 3 : 2);
  }

  // While it is written nobody knows the text of what is masked.
  draw(tokens) {
    this.count = tokens.filter(Boolean).length;
    while (this.spans.length > tokens.length) this.spans.pop().remove();
    tokens.forEach((token, i) => {
      const key = token ? token[0] + "\n" + token[1] : "";
      if (this.spans[i]?.dataset.key === key) return;
      const span = tokenSpan(token ? token[0] : "\u2007\u2007", false, token ? token[1] : 0);
      span.dataset.key = key;
      if (token) { span.classList.remove("masked"); span.textContent = token[0]; span.classList.add("new"); }
      else span.classList.add("active");
      if (this.spans[i]) this.spans[i].replaceWith(span); else this.part(".completion").append(span);
      this.spans[i] = span;
    });
    requestAnimationFrame(() => setTimeout(() => this.spans.forEach(span => span.classList.remove("new")), 120));
  }

  finish(trace) {
    this.trace = trace;
    this.count = trace.token_texts.length;
    const answer = trace.answer_length ?? this.count, parts = document.createDocumentFragment();
    this.spans = trace.token_texts.map((text, i) => {
      if (i === 0 || trace.blocks[i] !== trace.blocks[i - 1]) {
        const bar = parts.appendChild(document.createElement("span"));
        bar.className = "block";
        bar.dataset.block = trace.blocks[i];
      }
      const span = parts.appendChild(tokenSpan(text, i === answer - 1, Math.min(trace.confidence[i], 1)));
      span.classList.toggle("behind", i >= answer);
      span.title = `step ${trace.steps[i] + 1}, confidence ${percent(Math.min(trace.confidence[i], 1))}`;
      return span;
    });
    this.part(".completion").replaceChildren(parts);
    const last = trace.steps.reduce((a, b) => Math.max(a, b), 0), slider = this.part(".replay");
    slider.max = last;
    slider.value = last;
    slider.disabled = false;
    this.show(last);
  }

  show(step) {
    const { steps, token_texts } = this.trace, last = +this.part(".replay").max;
    this.spans.forEach((span, i) => {
      const visible = steps[i] <= step;
      span.textContent = visible ? token_texts[i] : "";
      span.classList.toggle("masked", !visible);
      span.classList.toggle("new", steps[i] === step && step < last);
    });
    this.say(`step ${step + 1} of ${last + 1}`);
  }
}

async function* eventsOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part.slice("data: ".length));
  }
}

const columns = models.map(model => new Column(model.name));
$("chat-choice").hidden = !models.some(model => model.chat);
$("chat").checked = models.every(model => model.chat);

async function write() {
  running?.abort();
  const mine = running = new AbortController();
  const body = { prompt: $("prompt-text").value, chat: $("chat").checked, max_tokens: +$("longest").value,
                 temperature: +$("temperature").value, seed: $("seed").value === "" ? Math.floor(Math.random() * 2 ** 31) : +$("seed").value };
  const headers = { "Content-Type": "application/json" };
  if ($("key").value) headers.Authorization = "Bearer " + $("key").value;
  $("stop").disabled = false;
  await Promise.all(columns.map(column => column.run(body, headers, mine.signal)));
  if (running === mine) { running = null; $("stop").disabled = true; }
}

$("form").addEventListener("submit", event => { event.preventDefault(); write(); });
$("stop").addEventListener("click", () => running?.abort());
$("prompt-text").addEventListener("keydown", event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("form").requestSubmit();
});
addEventListener("keydown", event => { if (event.key === "Escape") running?.abort(); });
