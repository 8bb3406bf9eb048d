"use strict";
// Decodes the embedded record: once as a whole, then one row (layer, KV head) a policy when it is looked at.
const data = JSON.parse(document.getElementById("record").textContent);
const n = data.tokens.length;
const LEVELS = 8;

async function bytesOf(text) {
  const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const plain = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(plain).arrayBuffer());
}

async function wordsOf(text) {
  const bytes = await bytesOf(text);
  const words = new Uint16Array(bytes.length / 2);
  for (let i = 0; i < words.length; i++) words[i] = bytes[i] | (bytes[i + words.length] << 8);
  return words;
}

async function floatsOf(text) {
  const bits = Uint32Array.from(await wordsOf(text), (word) => word << 16);
  return new Float32Array(bits.buffer);
}

function startsOf(counts) {
  const starts = new Int32Array(counts.length + 1);
  for (let i = 0; i < counts.length; i++) starts[i + 1] = starts[i] + counts[i];
  return starts;
}

async function loadPolicy(entry) {
  const [kept, factors, sourceTokens, neighborCounts, neighborTokens, similarities] = await Promise.all([
    bytesOf(entry.kept), floatsOf(entry.factors), wordsOf(entry.sourceTokens), wordsOf(entry.neighborCounts),
    wordsOf(entry.neighborTokens), wordsOf(entry.similarities),
  ]);
  const policy = {
    ...entry, kept, factors, sourceTokens, neighborCounts, neighborTokens, similarities,
    graph: entry.policy.graph, sequential: entry.policy.graph?.update === "sequential",
    candidateStarts: startsOf(entry.candidates), sourceStarts: startsOf(entry.sources),
    neighborStarts: startsOf(neighborCounts.map((each) => Math.min(each, data.listed))), widths: [],
  };
  for (let row = 0; row < data.layers * data.heads; row++) {
    let width = 0;
    for (let token = 0; token < n; token++) width += keptBit(policy, row * n + token);
    policy.widths.push(width);
  }
  return policy;
}

const keptBit = (policy, place) => (policy.kept[place >> 3] >> (7 - (place & 7))) & 1;

/* One row as arrays over tokens: rank -1 and score NaN where a token does not compete; step -1 where it is no source. */
function readRow(policy, row) {
  const scores = sets[policy.scores];
  const view = {
    kept: new Uint8Array(n), always: new Uint8Array(n), rank: new Int32Array(n).fill(-1), score: new Float32Array(n).fill(NaN),
    candidate: new Uint8Array(n), factor: new Float32Array(n).fill(1), step: new Int32Array(n).fill(-1),
    contenders: 0, candidates: policy.candidates[row], shift: policy.shifts[row],
  };
  for (const [start, stop] of policy.always[Math.floor(row / data.heads)]) view.always.fill(1, start, stop);
  for (let i = 0; i < n; i++) {
    view.kept[i] = keptBit(policy, row * n + i);
    const token = scores.order[row * n + i];
    const score = scores.ranked[row * n + i];
    if (view.always[token] || !(score > -Infinity)) continue;
    view.score[token] = score;
    view.rank[token] = view.contenders;
    if (view.contenders < view.candidates) {
      view.candidate[token] = 1;
      view.factor[token] = policy.factors[policy.candidateStarts[row] + view.contenders];
    }
    view.contenders++;
  }
  const first = policy.sourceStarts[row];
  view.sources = policy.sourceTokens.subarray(first, policy.sourceStarts[row + 1]);
  view.sources.forEach((token, step) => { view.step[token] = step; });
  view.neighborsOf = (step) => {
    const [start, stop] = [policy.neighborStarts[first + step], policy.neighborStarts[first + step + 1]];
    const found = [];
    for (let i = start; i < stop; i++) found.push({ token: policy.neighborTokens[i], similarity: policy.similarities[i] / 65535 });
    return found;
  };
  view.changedBy = (step) => policy.neighborCounts[first + step];
  view.levels = levelsOf(view);
  return view;
}

const updatedScore = (view, token) => (view.score[token] - view.shift) * view.factor[token];

function signalOf(policy, similarity) {
  const { signal, strength, rounds, update } = policy.graph;
  if (signal === "evict") return NaN;
  const once = 1 + (signal === "enhance" ? 1 : -1) * strength * similarity;
  return update === "product" ? once ** rounds : once;
}

/* Shades 0..8 by token: each step twice as far up the ranking; or how much of its score a token lost, in logs. */
function levelsOf(view) {
  const byRank = (rank) => (rank < 0 ? 0 : Math.max(0, Math.min(LEVELS, Math.floor(Math.log2(n / (rank + 1))))));
  const score = Uint8Array.from(view.rank, byRank);
  const tokens = [...view.rank.keys()].filter((token) => view.candidate[token]);
  const updated = new Uint8Array(n);
  const value = (token) => (Number.isNaN(view.factor[token]) ? -Infinity : updatedScore(view, token));
  tokens.sort((a, b) => value(b) - value(a) || a - b).forEach((token, rank) => { updated[token] = byRank(rank); });
  const change = Float32Array.from(view.factor, (factor) => (Number.isNaN(factor) ? 99 : Math.min(99, Math.abs(Math.log(factor)))));
  const most = change.reduce((a, b) => Math.max(a, b), 1e-6);
  const lowered = Uint8Array.from(change, (each) => Math.ceil((each / most) * LEVELS - 1e-3));
  return { score, updated, lowered };
}
