"use strict";
const content = JSON.parse(document.getElementById("content").textContent);
const likert = content.mode === "likert";
const get = (id) => document.getElementById(id);

// ---- what is kept: one record a rater, read again before every write, since two tabs may be open

const memory = {};
let kept = true;
const read = (key) => {
  try { return JSON.parse(localStorage.getItem(key)) ?? memory[key]; } catch { return memory[key]; }
};
const write = (key, value) => {
  memory[key] = value;
  try { localStorage.setItem(key, JSON.stringify(value)); kept = true; } catch { kept = false; }
  get("forgetful").hidden = kept;
};
const LAST = `rating ${content.kit}`;
let rater = null;
const record = () => read(`${LAST} ${rater}`) ?? { at: 0, values: {} };
const change = (edit) => { const now = record(); edit(now); write(`${LAST} ${rater}`, now); };

// ---- what is shown: conversations in one order for all raters, so that those who stop early overlap;
// the replies of each in an order drawn from the rater's name

function hash(text) {
  let h = 2166136261;
  for (const c of new TextEncoder().encode(text)) h = Math.imul(h ^ c, 16777619);
  h = Math.imul(h ^ (h >>> 15), 2246822507);
  h = Math.imul(h ^ (h >>> 13), 3266489909);
  return (h ^ (h >>> 16)) >>> 0;
}
const shuffled = (things, name) => things
  .map((thing) => [hash(`${content.kit} ${rater} ${name(thing)}`), thing])
  .sort((a, b) => a[0] - b[0]).map((pair) => pair[1]);

let screens = [];
function plan() {
  screens = [];
  for (const item of content.items) {
    const replies = shuffled(item.replies, (reply) => reply.id);
    if (likert) {
      screens.push({ item, units: replies.map((reply, n) => ({ key: reply.id, replies: [reply], position: n + 1 })) });
      continue;
    }
    const pairs = [];
    for (let a = 0; a < item.replies.length; a++)
      for (let b = a + 1; b < item.replies.length; b++) pairs.push([item.replies[a], item.replies[b]]);
    const key = (pair) => pair.map((reply) => reply.id).sort().join(" ");
    for (const pair of shuffled(pairs, key)) {
      const order = shuffled(pair, (reply) => `${key(pair)} ${reply.id}`);
      screens.push({ item, units: [{ key: key(pair), replies: order }] });
    }
  }
}
const questions = likert ? content.scales : [{ key: "chosen", name: "Better reply" }];
const judged = (values, unit) => questions.filter((q) => values[unit.key]?.[q.key] !== undefined).length;
const finished = (values, screen) => screen.units.every((unit) => judged(values, unit) === questions.length);

// ---- building the page: texts enter by textContent alone, so that nothing in a reply is ever markup

function make(tag, properties = {}, ...children) {
  const { aria = {}, ...plain } = properties;
  const node = Object.assign(document.createElement(tag), plain);
  for (const [name, value] of Object.entries(aria)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
const words = (reply) => reply.text.trim()
  ? make("p", { textContent: reply.text })
  : make("p", { className: "faint", textContent: "(an empty reply)" });

function radios(unit, question, options) {
  const chosen = record().values[unit.key]?.[question.key];
  const group = make("div", { className: "points", aria: { role: "radiogroup", "aria-label": question.name } });
  for (const [value, shown, said] of options) {
    const input = make("input", {
      type: "radio", name: `${unit.key} ${question.key}`, value, checked: chosen === value,
      aria: { "aria-label": said },
    });
    input.addEventListener("change", () => {
      change((now) => { (now.values[unit.key] ??= {})[question.key] = value; });
      progress();
    });
    group.append(make("label", {}, input, shown));
  }
  return group;
}

function likertCard(unit) {
  const card = make("section", { className: "reply card", aria: { "aria-label": `reply ${unit.position}` } });
  card.dataset.unit = unit.key;
  card.append(words(unit.replies[0]));
  for (const scale of content.scales) {
    const options = content.points.map((said, n) => [String(n + 1), String(n + 1), `${scale.name}: ${n + 1}, ${said}`]);
    const label = make("span", {}, make("b", { textContent: scale.name }),
      make("small", { textContent: scale.question }));
    card.append(make("div", { className: "scale" }, label, radios(unit, scale, options)));
  }
  return card;
}

function comparison(unit) {
  const [first, second] = unit.replies;
  const cards = ["A", "B"].map((letter, n) => make("section", { className: "reply card" },
    make("b", { className: "faint", textContent: letter }), words(unit.replies[n])));
  const options = [[first.id, "A is better", "A is better"], ["tie", "tie", "tie"],
    [second.id, "B is better", "B is better"]];
  const choice = radios(unit, questions[0], options);
  choice.classList.add("choice");
  const whole = make("div", {}, make("div", { className: "two" }, ...cards), choice);
  whole.dataset.unit = unit.key;
  return whole;
}

function show(at, focus = true) {
  at = Math.max(0, Math.min(at, screens.length - 1));
  change((now) => { now.at = at; });
  const screen = screens[at];
  const turns = make("ol", { className: "turns" });
  screen.item.history.forEach((text, n) => {
    const who = n % 2 ? "listener" : "speaker";
    turns.append(make("li", { className: who }, make("b", { textContent: who }), text));
  });
  const title = make("h1", { textContent: `Conversation ${content.items.indexOf(screen.item) + 1} of ${content.items.length}` });
  const back = make("button", { type: "button", id: "back", textContent: "Back", disabled: at === 0 });
  const next = make("button", { type: "button", id: "next", className: "main", textContent: "Next" });
  back.addEventListener("click", () => show(at - 1));
  next.addEventListener("click", onward);
  const right = make("div", {}, ...screen.units.map(likert ? likertCard : comparison),
    make("div", { className: "nav" }, back, make("span", { id: "left", className: "small faint" }), next));
  get("rating").replaceChildren(title, make("div", { className: "split" }, make("div", { className: "card" }, turns), right));
  window.scrollTo(0, 0);
  progress();
  if (focus) (open()[0] ?? next).focus({ preventScroll: true });
}

// what is not judged yet on this screen: the first button of each group
const groups = () => [...get("rating").querySelectorAll(".points")];
const open = () => groups().filter((g) => !g.querySelector(":checked")).map((g) => g.querySelector("input"));

function onward() {
  const { at, values } = record();
  if (at < screens.length - 1) return show(at + 1);
  const missing = screens.findIndex((screen) => !finished(values, screen));
  if (missing >= 0 && missing !== at) return show(missing);
  get("left").textContent = missing < 0 ? "That was the last one: please save as csv." : "Some scales are still open here.";
}

function progress() {
  const { at, values } = record();
  const units = screens.flatMap((screen) => screen.units);
  const done = units.reduce((sum, unit) => sum + judged(values, unit), 0);
  const all = units.length * questions.length;
  get("progress").max = all;
  get("progress").value = done;
  get("status").textContent = `${rater}: ${done} of ${all} judgements` +
    (done === all ? ", all done: save them as csv and send the file" : "");
  for (const card of get("rating").querySelectorAll("[data-unit].reply"))
    card.classList.toggle("done", !card.querySelectorAll(".points:not(:has(:checked))").length);
  const rest = open().length;
  get("left").textContent = rest ? `${rest} open here` : "";
  if (at === screens.length - 1) get("next").textContent = done === all ? "Done" : "To what is open";
}

// ---- csv

const quoted = (value) => {
  const text = String(value ?? "");
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
};
function csv() {
  const { values } = record();
  const lines = [content.columns];
  for (const screen of screens)
    for (const unit of screen.units.filter((u) => judged(values, u))) {
      const [first, second] = unit.replies;
      const row = { kit: content.kit, rater, item: screen.item.id, reply: first.id, position: unit.position,
        first: first.id, second: second?.id, ...values[unit.key] };
      lines.push(content.columns.map((column) => row[column]));
    }
  return lines.map((line) => line.map(quoted).join(",") + "\n").join("");
}
get("save").addEventListener("click", () => {
  const name = rater.replace(/[^\p{L}\p{N}]+/gu, "-");
  const url = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
  make("a", { href: url, download: `ratings-${content.kit}-${name}.csv` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
});

// ---- coming, going, keys

function begin(name, focus = true) {
  rater = name;
  write(LAST, rater);
  plan();
  get("start").hidden = true;
  get("bar").hidden = get("rating").hidden = false;
  show(record().at, focus);
}
get("start").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = get("rater").value.trim().replace(/\s+/g, " ");
  if (name) begin(name);
});
get("leave").addEventListener("click", () => {
  write(LAST, null);
  get("start").hidden = false;
  get("bar").hidden = get("rating").hidden = true;
  get("rater").focus();
});
get("help")?.addEventListener("click", () => get("meaning").showModal());
get("close")?.addEventListener("click", () => get("meaning").close());
window.addEventListener("beforeunload", (event) => { if (!kept && rater) event.preventDefault(); });
document.addEventListener("keydown", (event) => {
  const keys = likert ? "12345" : "atb";
  const n = keys.indexOf(event.key.toLowerCase());
  const typing = event.target.matches("input[type=text]") || event.ctrlKey || event.metaKey || event.altKey;
  if (n < 0 || event.key.length !== 1 || typing || get("rating").hidden || get("meaning")?.open) return;
  const all = groups();
  const group = event.target.closest(".points") ?? open()[0]?.closest(".points");
  if (!group) return;
  group.querySelectorAll("input")[n].click();
  const following = all[all.indexOf(group) + 1]?.querySelector("input");
  (following ?? get("next")).focus();
});
const last = read(LAST);
if (last) begin(last, false);
