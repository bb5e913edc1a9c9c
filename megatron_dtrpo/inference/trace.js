// Replays the traces in #data. One step is shown at a time; everything on the page follows from `chosen` and `step`.
const make = (tag, attributes) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const name in attributes) element.setAttribute(name, attributes[name]);
  return element;
};
const traces = JSON.parse($("data").textContent);
for (const each of traces) {  // rounding of a softmax
  each.confidence = each.confidence.map(c => Math.min(c, 1));
  for (const token of each.discarded) token.confidence = Math.min(token.confidence, 1);
}
let trace, spans, ghosts, bars, counts, means, opens, last, chosen = 0, step = 0, timer = 0, pointed = null;

function choose(index, at) {
  chosen = index;
  trace = traces[index];
  last = trace.steps.reduce((a, b) => Math.max(a, b), 0);
  counts = new Array(last + 1).fill(0);
  means = new Array(last + 1).fill(0);
  const tally = (s, sure) => { counts[s] += 1; means[s] += sure; };
  trace.steps.forEach((s, i) => tally(s, trace.confidence[i]));
  for (const token of trace.discarded) tally(token.step, token.confidence);
  means = means.map((sum, s) => counts[s] ? sum / counts[s] : null);
  opens = new Map();  // block: the step in which its first token appeared
  trace.blocks.forEach((b, i) => opens.set(b, Math.min(trace.steps[i], opens.get(b) ?? Infinity)));
  const parts = document.createDocumentFragment();
  bars = [];
  const answer = trace.answer_length ?? trace.token_texts.length;
  spans = trace.token_texts.map((text, i) => {
    if (i === 0 || trace.blocks[i] !== trace.blocks[i - 1]) {
      const bar = parts.appendChild(document.createElement("span"));
      bar.className = "block";
      bar.dataset.block = trace.blocks[i];
      bars.push(bar);
    }
    const span = parts.appendChild(tokenSpan(text, i === answer - 1, trace.confidence[i]));
    span.classList.toggle("behind", i >= answer);
    span.dataset.index = i;
    return span;
  });
  // What is thrown away is never text of the page: it is not copied with the response, which does not hold it.
  ghosts = trace.discarded.map((token, i) => {
    const span = parts.appendChild(tokenSpan(token.token_text, token.ends, token.confidence));
    span.classList.add("ghost");
    span.dataset.ghost = i;
    return span;
  });
  $("completion").replaceChildren(parts);
  $("prompt").textContent = trace.prompt;
  for (const element of document.querySelectorAll(".if-discarded")) element.hidden = !trace.discarded.length;
  $("trace").value = index;
  $("step").max = last;
  hideTip();
  show(at);
}

function show(k) {
  step = Math.max(0, Math.min(last, k));
  let active = -1, shown = 0;  // the block that this step, or the last one before it that did anything, wrote in
  let at = step;
  while (at > 0 && !counts[at]) at -= 1;
  trace.steps.forEach((s, i) => { if (s === at) active = Math.max(active, trace.blocks[i]); });
  for (const token of trace.discarded) if (token.step === at) active = Math.max(active, token.block);
  spans.forEach((span, i) => {
    const visible = trace.steps[i] <= step;
    if (visible === span.classList.contains("masked")) {
      span.textContent = visible ? trace.token_texts[i] : "";
      span.classList.toggle("masked", !visible);
    }
    span.classList.toggle("new", trace.steps[i] === step);
    span.classList.toggle("active", trace.blocks[i] <= active);
    shown += visible;
  });
  ghosts.forEach((span, i) => {
    const token = trace.discarded[i];
    span.classList.toggle("masked", token.step > step);
    span.classList.toggle("new", token.step === step);
    span.classList.toggle("discarded", token.until <= step);
    span.classList.toggle("active", token.block <= active);
  });
  for (const bar of bars) bar.classList.toggle("active", +bar.dataset.block === active);
  const total = spans.length;
  $("step").value = step;
  $("step").setAttribute("aria-valuetext", `step ${step + 1} of ${last + 1}`);
  $("where").textContent = total ? `step ${step + 1} of ${last + 1}` : "no tokens";
  $("tokens").innerHTML = `${shown} <small>of ${total}</small>`;
  $("rate").textContent = (shown / (step + 1)).toFixed(2);
  $("thrown").textContent = trace.discarded.filter(token => token.until <= step).length;
  $("fresh").textContent = counts[step];
  $("mean").textContent = means[step] === null ? "\u2013" : percent(means[step]);
  $("previous").disabled = step === 0;
  $("next").disabled = step === last;
  if (pointed) showTip(pointed);
  moveCursor();
}

// Two panels over one axis of steps: bars of tokens per step, a curve of their mean confidence. What has been replayed
// is the same drawing in another colour, cut off at the current step.
const PANELS = [{ top: 22, bottom: 84 }, { top: 122, bottom: 176 }];
const MARGIN = 36, NARROWEST = 3;  // px: room for labels on the right, width of a bar

function drawChart() {
  const chart = $("chart"), width = Math.max(chart.clientWidth - MARGIN, 1), unit = width / (last + 1);
  // A long decoding has more steps than there is room for: neighbouring ones are then drawn as one, by their means.
  const group = Math.ceil(NARROWEST / unit), columns = [];
  for (let s = 0; s <= last; s += group) {
    const some = counts.slice(s, s + group), total = some.reduce((a, b) => a + b, 0);
    const sure = means.slice(s, s + group).reduce((sum, mean, i) => sum + mean * some[i], 0);
    columns.push({ rate: total / some.length, mean: total ? sure / total : null, left: s * unit,
                   width: some.length * unit });
  }
  const most = Math.max(1, ...columns.map(column => column.rate));
  const y = (panel, share) => panel.bottom - share * (panel.bottom - panel.top);
  const gap = Math.min(2, unit * group / 4);
  const barsPath = columns.map(column => {
    const height = column.rate / most * (PANELS[0].bottom - PANELS[0].top);
    return `M${column.left + gap / 2} ${PANELS[0].bottom}v${-height}h${column.width - gap}v${height}z`;
  }).join("");
  const curvePath = columns.map((column, i) => column.mean === null ? "" :
    `${i > 0 && columns[i - 1].mean !== null ? "L" : "M"}${column.left + column.width / 2} ${y(PANELS[1], column.mean)}`
  ).join("");
  chart.replaceChildren();
  const add = (tag, attributes, text) => {
    const element = chart.appendChild(make(tag, attributes));
    if (text !== undefined) element.textContent = text;
    return element;
  };
  for (const id of ["past-bars", "past-curve"])
    add("clipPath", { id }).appendChild(make("rect", { x: 0, y: 0, height: 200, width: 0 }));
  PANELS.forEach((panel, i) => {
    add("text", { x: 0, y: panel.top - 9 }, i ? "Mean confidence" : "Tokens");
    add("text", { x: width + 6, y: panel.top + 4 }, i ? "100%" : +most.toFixed(1));
    add("text", { x: width + 6, y: panel.bottom + 3 }, i ? "0%" : "0");
    for (const at of [panel.top, panel.bottom]) add("line", { class: "grid", x1: 0, x2: width, y1: at, y2: at });
  });
  add("text", { x: width, y: PANELS[0].top - 9, "text-anchor": "end" },
      group > 1 ? `means of ${group} steps` : "by step");
  for (const [name, d] of [["bars", barsPath], ["curve", curvePath]]) {
    add("path", { class: name, d });
    add("path", { class: name + " done", d, "clip-path": `url(#past-${name})` });
  }
  add("line", { id: "cursor", class: "cursor", y1: PANELS[0].top, y2: PANELS[1].bottom });
  add("circle", { id: "dot", class: "dot", r: 4.5 });
  chart.drawn = { unit, group, columns, y };
  moveCursor();
}

function moveCursor() {
  if (!$("cursor")) return;
  const { group, columns, y } = $("chart").drawn;
  const column = columns[Math.floor(step / group)];
  if (!column) return;  // of the trace before
  const at = column.left + column.width / 2;
  $("past-bars").firstChild.setAttribute("width", column.left + column.width);
  $("past-curve").firstChild.setAttribute("width", at);
  $("cursor").setAttribute("x1", at);
  $("cursor").setAttribute("x2", at);
  $("dot").setAttribute("cx", at);
  $("dot").setAttribute("cy", y(PANELS[1], column.mean ?? 0));
  $("dot").setAttribute("visibility", column.mean === null ? "hidden" : "visible");
}

// Moving through the steps: by hand, which ends playing, or by the timer.
function go(k) {
  pause();
  show(k);
  remember();
}

function play() {
  if (step === last) show(0);
  document.body.classList.add("playing");
  $("playing").textContent = "Pause";
  // A screen reader would otherwise be told of every step.
  $("where").setAttribute("aria-live", "off");
  clearInterval(timer);
  timer = setInterval(() => {
    show(step + 1);
    follow();
    if (step === last) { pause(); remember(); }
  }, 450 / $("speed").value);
}

function pause() {
  clearInterval(timer);
  timer = 0;
  document.body.classList.remove("playing");
  $("playing").textContent = "Play";
  $("where").removeAttribute("aria-live");
}

function toggle() {
  if (timer) { pause(); remember(); } else play();
}

// Keep what is being written in sight.
function follow() {
  const fresh = [...spans, ...ghosts].find(span => tokenOf(span).step === step);
  if (!fresh) return;
  const box = fresh.getBoundingClientRect();
  if (box.top < $("player").getBoundingClientRect().bottom || box.bottom > innerHeight)
    fresh.scrollIntoView({ block: "center" });
}

// The address says which step of which trace is shown, counted from 1 as on the page, so that it can be sent on.
function remember() {
  // Browsers refuse when this is done too often; the address is then a little behind.
  try { history.replaceState(null, "", `#trace=${chosen + 1}&step=${step + 1}`); } catch { /* see above */ }
}

function recall() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const index = (parseInt(asked.get("trace"), 10) || 1) - 1;
  const at = asked.get("step") === "last" ? Infinity : (parseInt(asked.get("step"), 10) || 1) - 1;
  pause();
  choose(Math.max(0, Math.min(traces.length - 1, index)), at);
}

// The token that a span stands for, in one form for kept and discarded ones.
function tokenOf(span) {
  if (span.dataset.ghost) return trace.discarded[+span.dataset.ghost];
  const i = +span.dataset.index;
  return { token_text: trace.token_texts[i], step: trace.steps[i], confidence: trace.confidence[i], block: trace.blocks[i] };
}

function showTip(span) {
  pointed = span;
  const tip = $("tip"), word = document.createElement("b"), token = tokenOf(span);
  const visible = token.step <= step, gone = token.until <= step;
  word.textContent = !visible ? "masked" : token.token_text === "" ? (token.ends ? "end token" : "no text of its own") :
    "\u201c" + token.token_text.replace(/\r?\n|\r/g, "\u21b5") + "\u201d";
  const lines = [`${visible ? "appeared" : "appears"} in step ${token.step + 1} of ${last + 1}`];
  if (gone) lines.push(`thrown away in step ${token.until + 1}, which wrote an end token before it`);
  if (visible) lines.push(`confidence ${percent(token.confidence)}`);
  lines.push(`block ${token.block}`);
  tip.replaceChildren(word, ...lines.flatMap((line, j) => j ? [document.createElement("br"), line] : [line]));
  tip.hidden = false;
  const box = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const left = Math.max(8, Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8));
  const below = box.bottom + 8 + tip.offsetHeight < innerHeight;
  tip.style.left = left + "px";
  tip.style.top = (below ? box.bottom + 8 : box.top - 8 - tip.offsetHeight) + "px";
  span.setAttribute("aria-describedby", "tip");
}

function hideTip() {
  pointed = null;
  $("tip").hidden = true;
}

const atToken = action => event => {
  const span = event.target.closest(".token");
  if (span) action(span);
};
$("completion").addEventListener("pointerover", atToken(showTip));
$("completion").addEventListener("focusin", atToken(showTip));
$("completion").addEventListener("pointerout", hideTip);
$("completion").addEventListener("focusout", hideTip);
addEventListener("scroll", hideTip, { passive: true });

$("play").addEventListener("click", toggle);
$("previous").addEventListener("click", () => go(step - 1));
$("next").addEventListener("click", () => { go(step + 1); follow(); });
$("step").addEventListener("input", () => go(+$("step").value));
$("speed").addEventListener("change", () => { if (timer) play(); });
$("trace").addEventListener("change", () => { pause(); choose(+$("trace").value, 0); drawChart(); remember(); });
addEventListener("hashchange", () => { recall(); drawChart(); });
new ResizeObserver(drawChart).observe($("chart"));

const scrub = event => {
  if (!(event.buttons & 1) && event.type !== "click") return;
  const chart = $("chart");
  go(Math.floor((event.clientX - chart.getBoundingClientRect().left) / chart.drawn.unit));
};
$("chart").addEventListener("pointermove", scrub);
$("chart").addEventListener("click", scrub);

// A button clicked with the mouse does not take the focus: the space bar goes on meaning play and pause.
for (const button of document.querySelectorAll("button"))
  button.addEventListener("mousedown", event => event.preventDefault());
addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest?.("select")) return;
  if (event.key === "Escape") hideTip();
  if (event.key === " " && !event.target.closest?.("button")) { event.preventDefault(); toggle(); }
  if (event.target.id === "step") return;  // the slider moves by itself
  if (event.key === "ArrowRight") { event.preventDefault(); go(step + 1); follow(); }
  if (event.key === "ArrowLeft") { event.preventDefault(); go(step - 1); follow(); }
});

traces.forEach((each, i) => {
  const start = each.prompt.trim().replace(/\s+/g, " ");
  $("trace").add(new Option(`${i + 1} \u00b7 ${start.length > 60 ? start.slice(0, 60) + "\u2026" : start}`, i));
});
$("chooser").hidden = traces.length < 2;
recall();
drawChart();
