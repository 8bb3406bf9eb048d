// The screen: built once a view; everything after that only changes classes of the tokens in it.
const state = { layer: 0, head: 0, view: 0, shade: "score", token: -1, step: Infinity };
const $ = (id) => document.getElementById(id);
const count = (value) => value.toLocaleString("en");
const make = (tag, set = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), set);
  element.append(...children);
  return element;
};

let sets, policies, views, panes = [];
const shown = () => (state.view === "both" ? [0, 1] : [state.view]);
const stepOf = (place) => Math.min(state.step, views[place].sources.length);
const rowNumber = () => state.layer * data.heads + state.head;

/* Lines of blocks, one block a pane, so that the panes stay level; a line ends where the text does, or where it gets long. */
function buildPanes() {
  panes = shown().map((place) => ({ place, spans: [], classes: new Array(n).fill("") }));
  const lines = [];
  if (state.view === "both") lines.push(make("div", { className: "line titles" }, ...panes.map(({ place }) => make("h2", {}, policies[place].name))));
  let blocks = [];
  data.tokens.forEach((text, token) => {
    if (!blocks.length) {
      blocks = panes.map(() => make("div", { className: "block" }));
      lines.push(make("div", { className: "line" }, ...blocks));
    }
    panes.forEach((pane, i) => blocks[i].append((pane.spans[token] = spanOf(text, token, pane.place))));
    const long = blocks[0].childElementCount;
    if ((long > 60 && text.endsWith("\n")) || long > 600) blocks = [];
  });
  $("panes").replaceChildren(...lines);
}

function spanOf(text, token, place) {
  const span = make("span", { id: `t${place}-${token}`, role: "option" });
  span.token = token;
  if (text === "") span.append(make("i", { className: "mark" }, "·"));
  text.split("\n").forEach((line, i) => {
    if (i) span.append(make("i", { className: "mark" }, "↵"), "\n");
    if (line) span.append(line);
  });
  return span;
}

function paint() {
  for (const pane of panes) {
    const { place, spans, classes } = pane;
    const [view, policy, other] = [views[place], policies[place], views[1 - place]];
    const near = new Map(pairsOf(view).map((each, i, all) => [each.token, 4 - Math.floor((4 * i) / all.length)]));
    const levels = view.levels[state.shade];
    const step = policy.sequential ? stepOf(place) : Infinity;
    for (let token = 0; token < n; token++) {
      let name = `t s${levels[token]}`;
      if (view.always[token]) name += " a";
      else if (view.kept[token]) name += view.step[token] >= step && view.step[token] >= 0 ? " later" : " k";
      if (!policy.sequential && view.step[token] >= 0) name += " src";
      if (state.view === "both" && view.kept[token] && !other.kept[token]) name += " only";
      if (near.has(token)) name += ` n${near.get(token)}`;
      if (token === state.token) name += " sel";
      if (classes[token] !== name) spans[token].className = classes[token] = name;
    }
    $("panes").setAttribute("aria-activedescendant", state.token < 0 ? "" : `t${panes[0].place}-${state.token}`);
  }
}

/* The selected token's pairs, most similar first: whom it changed, or, where it is no source, who changed it. */
function pairsOf(view) {
  if (state.token < 0) return [];
  return view.step[state.token] >= 0 ? view.neighborsOf(view.step[state.token]) : changers(view, state.token);
}

function changers(view, token) {
  const found = [];
  view.sources.forEach((source, step) => {
    for (const each of view.neighborsOf(step)) if (each.token === token) found.push({ token: source, similarity: each.similarity });
  });
  return found.sort((a, b) => b.similarity - a.similarity);
}

const visible = (text) => text.replace(/\n/g, "↵") || "·";
const number = (value) => (Number.isNaN(value) ? "–" : value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e4) ? value.toExponential(1) : String(Number(value.toPrecision(2))));

function around(token, width, mark = "") {
  const text = (from, to) => visible(data.tokens.slice(Math.max(0, from), to).join(""));
  return [text(token - width, token), make("b", { className: mark }, visible(data.tokens[token])), text(token + 1, token + 1 + width)];
}

function facts(pairs) {
  return make("dl", {}, ...pairs.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
}

function listOf(policy, view, found) {
  if (!found.length) return "";
  const head = make("li", { className: "head" }, make("span", {}, "token"), make("span", {}, "similarity"), make("span", {}, "factor"));
  return make("ul", { className: "list" }, head, ...found.map(({ token, similarity }) => {
    const factor = signalOf(policy, similarity);
    const words = make("span", { className: "words" }, ...around(token, 2, view.kept[token] ? "k" : ""));
    const button = make("button", { type: "button", title: `token ${token}` },
      words, make("span", { className: "by" }, similarity.toFixed(3)), make("span", { className: "by" }, Number.isNaN(factor) ? "evicted" : `× ${factor.toFixed(3)}`));
    button.addEventListener("click", () => select(token, "center"));
    return make("li", {}, button);
  }));
}

const verb = (policy) => ({ decay: "lowered", enhance: "raised", evict: "evicted" })[policy.graph.signal];

function describeToken(place) {
  const [policy, view, token] = [policies[place], views[place], state.token];
  const parts = [];
  if (policies.length > 1 && state.view === "both") parts.push(make("p", { className: `which ${place ? "second" : "first"}` }, policy.name));
  const step = view.step[token];
  const fate = view.always[token] ? "always kept" : view.kept[token] ? (policy.sequential && step >= 0 ? `kept, choice ${count(step + 1)} of ${count(view.sources.length)}` : "kept") : "dropped";
  const pairs = [["Fate", fate]];
  if (view.rank[token] >= 0) pairs.push(["Base score", number(view.score[token])], ["Rank by it", `${count(view.rank[token] + 1)} of ${count(view.contenders)}`]);
  if (policy.graph && view.candidate[token]) {
    const factor = view.factor[token];
    pairs.push(["The graph's factor", Number.isNaN(factor) ? "evicted" : `× ${number(factor)}`]);
    if (!Number.isNaN(factor)) pairs.push(["Updated score", number(updatedScore(view, token))]);
  } else if (policy.graph && view.rank[token] >= 0) pairs.push(["Candidate", "no"]);
  parts.push(facts(pairs));
  if (!policy.graph || view.always[token]) return parts;
  if (step >= 0) {
    const [found, total] = [view.neighborsOf(step), view.changedBy(step)];
    const which = total > found.length ? `the ${found.length} most similar of ${count(total)}` : "all of them";
    parts.push(make("p", { className: "hint" }, total ? `Whom it ${verb(policy)}: ${which}` : `It ${verb(policy)} nobody: none left is similar enough`), listOf(policy, view, found));
  } else if (view.candidate[token]) {
    const found = changers(view, token).slice(0, 12);
    parts.push(make("p", { className: "hint" }, found.length ? `Who ${verb(policy)} it, of the pairs that this page lists` : `No pair that this page lists ${verb(policy)} it`), listOf(policy, view, found));
  }
  return parts;
}

function describe() {
  const both = state.view === "both";
  const parts = [make("h2", {}, `Layer ${data.layerNumbers[state.layer]}, KV head ${state.head}`)];
  for (const place of shown()) {
    const [policy, view, row] = [policies[place], views[place], rowNumber()];
    const always = view.always.reduce((sum, each) => sum + each, 0);
    if (both) parts.push(make("p", { className: `which ${place ? "second" : "first"}` }, policy.name));
    const pairs = [["Kept", `${count(policy.widths[row])} of ${count(n)}`], ["Always kept", count(always)]];
    if (policy.graph) pairs.push(["Candidates", count(view.candidates)], [policy.sequential ? "Chosen one by one" : "Sources", count(view.sources.length)], ["Graph changed, layer", count(policy.changed[state.layer])]);
    pairs.push(["Score kept, layer", `${(policy.ratios[state.layer] * 100).toFixed(1)}%`]);
    parts.push(facts(pairs));
  }
  if (both) {
    let [shared, first, second] = [0, 0, 0];
    for (let i = 0; i < n; i++) {
      shared += views[0].kept[i] & views[1].kept[i];
      first += views[0].kept[i] & ~views[1].kept[i];
      second += ~views[0].kept[i] & views[1].kept[i];
    }
    parts.push(make("p", { className: "which" }, "Side by side"), facts([["Kept by both", count(shared)], [`Only ${policies[0].name}`, count(first)], [`Only ${policies[1].name}`, count(second)]]));
  }
  $("row").replaceChildren(...parts);
  if (state.token < 0) {
    $("token").replaceChildren(make("h2", {}, "Token"), make("p", { className: "hint" }, "Click a token: what became of it, whom it changed, and by whom it was changed."));
    return;
  }
  $("token").replaceChildren(make("h2", {}, `Token ${count(state.token)} `), make("p", { className: "quote" }, "… ", ...around(state.token, 6), " …"), ...shown().flatMap(describeToken));
}

function drawSteps() {
  const place = shown().find((each) => policies[each].sequential && views[each].sources.length);
  $("steps").hidden = place === undefined;
  if (place === undefined) return;
  const [view, step] = [views[place], stepOf(place)];
  Object.assign($("step"), { max: String(view.sources.length), value: String(step) });
  const token = view.sources[step - 1];
  $("step-out").textContent = step ? `${count(step)} of ${count(view.sources.length)}: “${visible(data.tokens[token]).trim() || "␣"}”, rank ${count(view.rank[token] + 1)} by base score` : `0 of ${count(view.sources.length)}: only what is always kept`;
}

function drawLegend() {
  const scale = make("span", { className: "scale" }, ...[...Array(LEVELS + 1).keys()].map((level) => make("b", { className: `s${level}` })));
  const names = { score: ["lower half", "best by base score"], updated: ["lower half", "best by updated score"], lowered: ["unchanged", "changed most"] }[state.shade];
  const policy = policies[shown()[0]];
  const parts = [make("i", {}, names[0], scale, names[1]), make("i", {}, make("span", { className: "k" }, "kept")), make("i", {}, make("span", { className: "a" }, "always kept")), make("i", {}, make("span", { className: "t" }, "dropped"))];
  if (policy.graph && !policy.sequential) parts.push(make("i", { className: "src" }, "source"));
  if (policies.some((each, place) => shown().includes(place) && each.graph)) parts.push(make("i", {}, make("span", { className: "n2" }, "similar to the selected")));
  if (state.view === "both") parts.push(make("i", {}, make("span", { className: "only t", style: "--only: var(--first)" }, "only left"), " ", make("span", { className: "only t", style: "--only: var(--second)" }, "only right")));
  $("legend").replaceChildren(...parts);
}

function drawPlot() {
  const [width, height, bars] = [320, 64, data.layers * data.heads];
  const svg = (tag, set, ...children) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(set)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  const [slot, group] = [width / data.layers, width / data.layers / (data.heads + 0.6)];
  const parts = [];
  const most = Math.max(...shown().flatMap((place) => policies[place].widths));
  for (const place of shown()) {
    const policy = policies[place];
    const plot = svg("svg", { viewBox: `0 -12 ${width} ${height + 26}`, role: "img", "aria-label": `${policy.name}: tokens kept by layer and KV head` });
    plot.append(svg("text", { x: 0, y: -3 }, `${policy.name}: tokens kept, at most ${count(most)}`), svg("rect", { class: "here", x: state.layer * slot, y: 0, width: slot, height }));
    for (let row = 0; row < bars; row++) {
      const [layer, head] = [Math.floor(row / data.heads), row % data.heads];
      const always = policy.always[layer].reduce((sum, [start, stop]) => sum + stop - start, 0);
      const [x, full, lower] = [layer * slot + (head + 0.3) * group, (policy.widths[row] / most) * height, (Math.min(always, policy.widths[row]) / most) * height];
      const bar = svg("g", { class: row === rowNumber() ? "on" : "", "data-row": row },
        svg("rect", { class: "always", x, y: height - lower, width: group * 0.85, height: lower }),
        svg("rect", { class: "chosen", x, y: height - full, width: group * 0.85, height: full - lower }),
        svg("rect", { class: "hit", x, y: 0, width: group, height }));
      bar.append(svg("title", {}, `layer ${data.layerNumbers[layer]}, KV head ${head}: ${count(policy.widths[row])} kept, ${count(always)} of them always`));
      plot.append(bar);
    }
    plot.append(svg("text", { x: 0, y: height + 11 }, `layer ${data.layerNumbers[0]}`), svg("text", { x: width, y: height + 11, "text-anchor": "end" }, String(data.layerNumbers.at(-1))));
    parts.push(plot);
  }
  const ratio = svg("svg", { viewBox: `0 -14 ${width} 58`, class: state.view === "both" ? "both" : "", role: "img", "aria-label": "Share of the score kept, by layer" });
  ratio.append(svg("text", { x: 0, y: -4 }, "share of the score kept, 0 to 100%"), svg("rect", { class: "here", x: state.layer * slot, y: 0, width: slot, height: 40 }));
  for (const y of [0, 20, 40]) ratio.append(svg("line", { class: "axis", x1: 0, x2: width, y1: y, y2: y }));
  for (const place of shown()) {
    const points = policies[place].ratios.map((each, layer) => `${(layer + 0.5) * slot},${40 - 40 * each}`).join(" ");
    ratio.append(svg("polyline", { class: `ratio r${place}`, points }));
  }
  $("plot").replaceChildren(...parts, ratio);
}

function drawFields() {
  const ignored = new Set(["source_ratio", "neighbors", "threshold", "rounds"]); // by the sequential update
  const open = { candidates: "all", neighbors: "all at the threshold", graph: "none" }; // what null means
  const told = policies.flatMap(({ name, fingerprint, sequential, policy: { graph, ...fields } }) => {
    const given = Object.entries({ ...fields, ...(graph ?? { graph }), fingerprint })
      .map(([field, value]) => [field, value ?? open[field]])
      .filter(([field, value]) => value !== undefined && typeof value !== "object" && !(sequential && ignored.has(field)));
    return [make("p", { className: "which" }, name), facts(given.map(([field, value]) => [field.replaceAll("_", " "), String(value)]))];
  });
  $("fields").replaceChildren(...told);
}

// ---- what can be done -------------------------------------------------------------------------------------------

function look() { // at another row
  views = policies.map((policy) => readRow(policy, rowNumber()));
  Object.assign($("layer"), { value: String(state.layer) });
  $("layer-out").textContent = String(data.layerNumbers[state.layer]);
  press("head", state.head);
  refresh();
  drawPlot();
}

function refresh() {
  paint();
  describe();
  drawSteps();
}

function press(id, value) {
  for (const button of $(id).querySelectorAll("button")) button.setAttribute("aria-pressed", String(button.value === String(value)));
}

function setView(view) {
  state.view = view;
  press("view", view);
  buildPanes();
  drawLegend();
  look();
}

function select(token, block = "nearest") {
  state.token = token;
  refresh();
  if (token < 0) return;
  const show = () => panes[0].spans[token].scrollIntoView({ block });
  show();
  if (block === "center") requestAnimationFrame(() => requestAnimationFrame(show)); // lines on the way get their true heights only now
}

function setStep(step, scroll = true) {
  const place = shown().find((each) => policies[each].sequential && views[each].sources.length);
  if (place === undefined) return;
  state.step = Math.max(0, Math.min(views[place].sources.length, step));
  const token = state.step ? views[place].sources[state.step - 1] : -1;
  if (scroll) select(token, "center");
  else { state.token = token; refresh(); }
}

function go(layer, head) {
  Object.assign(state, { layer: (layer + data.layers) % data.layers, head: (head + data.heads) % data.heads, step: Infinity });
  look();
}

function next(wanted) {
  for (let token = state.token + 1; token < n; token++) if (wanted(token)) return select(token, "center");
  return undefined;
}

let playing = 0;
function play() {
  const stop = () => { clearInterval(playing); playing = 0; $("play").textContent = "▶"; };
  if (playing) return stop();
  const total = Number($("step").max);
  if (Number($("step").value) >= total) setStep(0, false);
  $("play").textContent = "❚❚";
  playing = setInterval(() => (Number($("step").value) >= total || $("steps").hidden ? stop() : setStep(Number($("step").value) + 1, false)), 120);
  return undefined;
}

const KEYS = {
  ArrowLeft: () => select(Math.max(0, state.token - 1)),
  ArrowRight: () => select(Math.min(n - 1, state.token + 1)),
  k: () => next((token) => views[shown()[0]].kept[token] && !views[shown()[0]].always[token]),
  d: () => views.length > 1 && next((token) => views[0].kept[token] !== views[1].kept[token]),
  ",": () => go(state.layer - 1, state.head),
  ".": () => go(state.layer + 1, state.head),
  h: () => go(state.layer, state.head + 1),
  v: () => setView(policies.length < 2 ? 0 : { 0: 1, 1: "both", both: 0 }[state.view]),
  "[": () => setStep(Number($("step").value) - 1),
  "]": () => setStep(Number($("step").value) + 1),
  Escape: () => select(-1),
};

function listen() {
  $("panes").addEventListener("click", (event) => {
    const span = event.target.closest(".t");
    if (span) select(span.token === state.token ? -1 : span.token);
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
    if (event.target.tagName === "INPUT" && event.key.startsWith("Arrow")) return; // a slider's own
    const act = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!act) return;
    event.preventDefault();
    act();
  });
  $("layer").addEventListener("input", (event) => go(Number(event.target.value), state.head));
  $("shade").addEventListener("change", (event) => { state.shade = event.target.value; drawLegend(); paint(); });
  $("step").addEventListener("input", (event) => setStep(Number(event.target.value)));
  $("play").addEventListener("click", play);
  $("plot").addEventListener("click", (event) => {
    const row = event.target.closest("[data-row]")?.dataset.row;
    if (row !== undefined) go(Math.floor(row / data.heads), row % data.heads);
  });
  $("theme").addEventListener("click", () => {
    const dark = getComputedStyle(document.documentElement).colorScheme.includes("dark") && (document.documentElement.dataset.theme === "dark" || (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches));
    document.documentElement.dataset.theme = dark ? "light" : "dark";
  });
}

function button(id, value, text, act) {
  const made = make("button", { type: "button", value: String(value) }, text);
  made.addEventListener("click", act);
  $(id).append(made);
}

async function start() {
  sets = await Promise.all(data.scores.map(async (each) => ({ order: await wordsOf(each.order), ranked: await floatsOf(each.ranked) })));
  policies = await Promise.all(data.policies.map(loadPolicy));
  $("about").textContent = `${data.title} · ${count(n)} tokens · ${data.layers} layers × ${data.heads} KV heads · ${policies.map((each) => each.name).join(" against ")}`;
  policies.forEach((policy, place) => button("view", place, policy.name, () => setView(place)));
  if (policies.length > 1) button("view", "both", "Side by side", () => setView("both"));
  for (let head = 0; head < data.heads; head++) button("head", head, String(head), () => go(state.layer, head));
  $("layer").max = String(data.layers - 1);
  state.layer = Math.floor(data.layers / 2);
  drawFields();
  listen();
  setView(0);
  document.documentElement.dataset.ready = "yes";
}

start().catch((error) => {
  $("panes").textContent = `This page could not be drawn: ${error.message}. It needs a browser of 2024 or later.`;
  throw error;
});
