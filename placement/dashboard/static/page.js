// The page keeps what the server tells as entries (key -> value), and draws anew what has changed.
"use strict";

const AGAIN = 3000; // milliseconds until a server that refused is asked again
const entries = new Map();

let assignmentsOn = new Map(); // node id -> [[deployment, assignment]]

const every = (kind) => [...entries].filter(([key]) => key.startsWith(`${kind}:`)).map(([, value]) => value);

function take(changed, whole) {
  if (whole) entries.clear();
  const dirty = new Set(); // nodes on which somebody came or went
  const touch = (one) => one && one.assignments && one.assignments.forEach((a) => dirty.add(a.node));
  for (const [key, value] of Object.entries(changed)) {
    if (key.startsWith("deployment:")) {
      touch(entries.get(key));
      touch(value);
    }
    if (value === null) entries.delete(key);
    else entries.set(key, value);
  }
  const moved = whole || Object.keys(changed).some((key) => key.startsWith("deployment:"));
  const linked = whole || Object.keys(changed).some((key) => key.startsWith("machine:"));
  if (moved) {
    assignmentsOn = new Map();
    for (const one of every("deployment"))
      for (const a of one.assignments) {
        if (!assignmentsOn.has(a.node)) assignmentsOn.set(a.node, []);
        assignmentsOn.get(a.node).push([one, a]);
      }
  }
  for (const [key, value] of entries)
    // a new object has the card drawn anew
    if (key.startsWith("node:") && (linked || dirty.has(value.id))) entries.set(key, { ...value });
  draw();
}

function listen() {
  const stream = new EventSource("stream");
  stream.addEventListener("whole", (event) => take(JSON.parse(event.data), true));
  stream.addEventListener("changes", (event) => take(JSON.parse(event.data), false));
  stream.onerror = () => {
    say($("service"), "no connection to `placement dashboard`; trying again", "bad");
    if (stream.readyState === EventSource.CLOSED) setTimeout(listen, AGAIN);
  };
}

// What is announced to screen readers is set only when it differs.
function say(where, text, kind = "") {
  if (where.textContent !== text) where.textContent = text;
  if (where.className !== kind) where.className = kind;
}

// -- drawing -----------------------------------------------------------------------------------------

function draw() {
  const service = entries.get("service");
  say($("service"), service.ok ? `live, ${service.cluster}` : service.problem, service.ok ? "ok" : "bad");
  drawTotals();
  drawNodes();
  drawLists();
  if (open.kind) drawDetail();
}

function drawTotals() {
  const sums = entries.get("totals");
  if (!sums) return;
  const shown = [
    ["GPUs", sums.gpus],
    ["placed", sums.held],
    ["free", sums.free],
  ];
  if (sums.other) shown.push(["of other Ray users", sums.other]);
  if (sums.unknown) shown.push(["unknown", sums.unknown]);
  shown.push(["nodes", sums.nodes], ["replicas", sums.replicas]);
  if (sums.pending) shown.push(["pending", sums.pending]);
  fill(
    $("totals"),
    shown.map(([name, value]) => [name, `${value}`]),
    (value) => el("div", {}, el("dt"), el("dd", {}, value)),
  );
  for (const one of $("totals").children) one.firstChild.textContent = one.dataset.key;
}

// ----------------------------------------------------------------------------------------------------

$("close").addEventListener("click", hide);
$("filter").addEventListener("input", () => {
  drawNodes();
  drawLists();
});
legend();
listen();
