// The page. It keeps what the server tells as entries (key -> value) and draws anew what has changed.
// Every text goes through textContent; the page's policy forbids markup made from texts.
"use strict";

const LARGE = 24; // so many nodes have their links and who sits there drawn; of more each has a few cells
const CELL = 54, GAP = 3, SOCKET_GAP = 10; // as style.css has them
const EVENTS = 60;
const AGAIN = 3000;
const BY_NAME = new Intl.Collator(undefined, { numeric: true }).compare;
const entries = new Map();
const $ = (id) => document.getElementById(id);

// -- elements ----------------------------------------------------------------------------------------

function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null) continue;
    if (name === "class") made.className = value;
    else if (name === "on") made.addEventListener("click", value);
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((one) => one !== "" && one !== null && one !== undefined));
  return made;
}

function shape(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// Puts children made of entries into a parent, in order; those whose value is the same object are left as they are.
function fill(parent, wanted, make) {
  const had = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  let at = parent.firstElementChild;
  for (const [key, value] of wanted) {
    let child = had.get(key);
    had.delete(key);
    if (child && child.value !== value) {
      const made = make(value), focused = focusIn(child);
      if (at === child) at = child.nextElementSibling;
      child.remove();
      child = made;
      child.dataset.key = key;
      child.value = value;
      parent.insertBefore(child, at);
      focusAgain(child, focused);
    } else if (child) {
      if (at === child) at = child.nextElementSibling;
      else parent.insertBefore(child, at);
    } else {
      child = make(value);
      child.dataset.key = key;
      child.value = value;
      parent.insertBefore(child, at);
    }
  }
  for (const child of had.values()) child.remove();
}

const focusIn = (part) => (part.contains(document.activeElement) ? document.activeElement.dataset.at : undefined);

function focusAgain(part, at) {
  if (at === undefined) return;
  for (const one of part.querySelectorAll("[data-at]")) if (one.dataset.at === at) return one.focus();
}

// -- texts -------------------------------------------------------------------------------------------

const counted = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
const rate = (gbps) => Number(gbps.toPrecision(3)).toString();

function ordinals(numbers) {
  const sorted = [...numbers].sort((a, b) => a - b), runs = [];
  for (const one of sorted) {
    const last = runs[runs.length - 1];
    if (last && one === last[1] + 1) last[1] = one;
    else runs.push([one, one]);
  }
  return runs.map(([a, b]) => (a === b ? `${a}` : `${a}-${b}`)).join(",");
}

function bandwidth(a) {
  if (a.bandwidth_gb_per_s === undefined) return "";
  const upper = a.upper_bandwidth_gb_per_s, range = upper && upper > a.bandwidth_gb_per_s;
  const rates = rate(a.bandwidth_gb_per_s) + (range ? `-${rate(upper)}` : "");
  return `${rates} GB/s${a.weakest_link ? `, ${a.weakest_link}` : ""}${a.bandwidth_measured ? ", measured" : ""}`;
}

function holds(a) {
  if (a.egress_resource) return `${counted(a.egress_units, "request")} of ${a.egress_resource}`;
  if (!a.gpus.length) return counted(a.cpus, "CPU");
  if (a.mig) return `${a.mig}, slot ${ordinals(a.gpus)}`;
  return `${a.share < 1 ? `${rate(a.share)} of ` : ""}GPU ${ordinals(a.gpus)}`;
}

function age(seconds) {
  for (const [unit, size] of [["d", 86400], ["h", 3600], ["m", 60]])
    if (seconds >= size) return `${Math.floor(seconds / size)}${unit}`;
  return `${Math.max(0, Math.floor(seconds))}s`;
}

function ownerText(owner) {
  if (!owner) return "nobody: it stays until it is released";
  return typeof owner === "string" ? owner : [owner.kind, owner.actor || owner.job].filter(Boolean).join(" ");
}

const notPlaced = (one) => one.not_placed;
const gib = (bytes) => (bytes === null || bytes === undefined ? "?" : `${rate(bytes / 2 ** 30)} GiB`);

// -- what the server tells ---------------------------------------------------------------------------

let assignmentsOn = new Map(); // node id -> [[deployment, assignment]]

const every = (kind) => [...entries].filter(([key]) => key.startsWith(`${kind}:`)).map(([, value]) => value);

function take(changed, whole) {
  if (whole) entries.clear();
  const dirty = new Set(); // nodes on which somebody came or went
  const touch = (one) => one && one.assignments && one.assignments.forEach((a) => dirty.add(a.node));
  for (const [key, value] of Object.entries(changed)) {
    if (key.startsWith("deployment:")) { touch(entries.get(key)); touch(value); }
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
  for (const [key, value] of entries)  // a new object has the card drawn anew
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
  const shown = [["GPUs", sums.gpus], ["placed", sums.held], ["free", sums.free]];
  if (sums.other) shown.push(["of other Ray users", sums.other]);
  if (sums.unknown) shown.push(["unknown", sums.unknown]);
  shown.push(["nodes", sums.nodes], ["replicas", sums.replicas]);
  if (sums.pending) shown.push(["pending", sums.pending]);
  fill($("totals"), shown.map(([name, value]) => [name, `${value}`]), (value) => el("div", {}, el("dt"), el("dd", {}, value)));
  for (const one of $("totals").children) one.firstChild.textContent = one.dataset.key;
}

function isShown(node) {
  return node.gpu_count || node.egress.length || node.cpus.held || node.state === "dead";
}

function kindOf(node) {
  if (node.state === "dead") return "3Dead nodes";
  if (!node.gpu_count) return node.egress.length ? "1Egress nodes" : "2CPU nodes";
  const slots = new Map();
  for (const [, mig, problem] of node.gpus) if (!problem) slots.set(mig, (slots.get(mig) || 0) + 1);
  const whole = slots.get(null) || 0, lost = node.gpus.filter((gpu) => gpu[2]).length;
  slots.delete(null);
  const parts = whole ? [`${whole} × ${node.gpu_model || "GPU"}`, howLinked(node)] : [];
  for (const [profile, count] of slots) parts.push(`${count} × MIG ${profile}`);
  if (lost) parts.push(`${lost} unknown`);
  return `0${parts.join(", ")}`;
}

function wholeIslands(node) {
  const whole = node.gpus.map((gpu, at) => at).filter((at) => node.gpus[at][1] === null && !node.gpus[at][2]);
  const islands = node.islands.length ? node.islands.map((one) => one.filter((at) => whole.includes(at))) : [whole];
  return islands.filter((one) => one.length);
}

function howLinked(node) {
  if (!node.topology_known) return "topology unknown";
  if (node.nvswitch) return "NVSwitch";
  const sizes = wholeIslands(node).map((one) => one.length);
  if (Math.max(...sizes) === 1) return "PCIe only";
  return sizes.length === 1 ? "one NVLink island" : `NVLink islands of ${sizes.join(" + ")}`;
}

// What others hold without anybody knowing where is not free either.
const freeOn = (node) => Math.max(0, node.gpus.filter((gpu) => gpu[0] === "free").length - node.others_unlocated);

function words() {
  return $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
}

function nodeText(node) {
  const states = new Set(node.gpus.map((gpu) => gpu[0]));
  const who = (assignmentsOn.get(node.id) || []).map(([one, a]) => `${one.name}/${a.replica_index}`);
  const egress = node.egress.map((one) => one.resource);
  const profiles = new Set(node.gpus.filter((gpu) => gpu[1] !== null).map((gpu) => `mig ${gpu[1]}`));
  return [...profiles, node.name, node.address, node.gpu_model, node.topology, node.state, node.problem, ...states, ...who, ...egress]
    .join(" ").toLowerCase();
}

function drawNodes() {
  const nodes = every("node").filter(isShown), wanted = words();
  const matches = (text) => wanted.every((word) => text.includes(word));
  const shown = wanted.length ? nodes.filter((node) => matches(nodeText(node))) : nodes;
  const small = nodes.length > LARGE, map = $("map");
  if (map.classList.contains("small") !== small) {
    map.classList.toggle("small", small);
    map.replaceChildren();
  }
  const kinds = new Map();
  const group = (node) => (small ? kindOf(node) : "0Nodes"); // each of a few says what it is itself
  for (const node of shown.sort((a, b) => kindOf(a)[0] - kindOf(b)[0] || BY_NAME(a.name, b.name))) {
    const kind = group(node);
    if (!kinds.has(kind)) kinds.set(kind, []);
    kinds.get(kind).push(node);
  }
  const gpusOf = (alike) => alike.reduce((sum, node) => sum + node.gpu_count, 0);
  const order = [...kinds].sort(([a, some], [b, others]) => a[0] - b[0] || gpusOf(others) - gpusOf(some) || BY_NAME(a, b));
  fill(map, order.map(([kind]) => [kind, kind]), (kind) =>
    el("section", { class: "kind" }, el("h2", {}, kind.slice(1), el("small")), el("div", { class: "cards" })));
  order.forEach(([kind, alike], at) => {
    const [heading, cards] = map.children[at].children;
    const free = alike.reduce((sum, node) => sum + freeOn(node), 0);
    const told = counted(alike.length, "node") + (kind[0] === "0" ? `, ${free} of ${gpusOf(alike)} free` : "");
    heading.className = small ? "" : "unseen";
    if (heading.lastChild.textContent !== told) heading.lastChild.textContent = told;
    fill(cards, alike.map((node) => [node.id, node]), (node) => card(node, small));
  });
  $("nothing").hidden = shown.length > 0;
  say($("nothing"), nodes.length ? "No node is like that." : "No node has GPUs or egress yet.");
  rove();
  markChosen();
}

// -- a node ------------------------------------------------------------------------------------------

function card(node, small) {
  const free = freeOn(node);
  const told = node.state === "dead" ? `died ${age(node.dead_seconds)} ago`
    : `${node.gpu_count ? `${free} free` : ""}${node.state === "draining" ? " draining" : ""}`;
  const title = el("button", {
    class: "name", type: "button", "data-at": "name", "data-node": node.id,
    "aria-label": `node ${node.name}${told ? `, ${told}` : ""}`, tabindex: "-1",
  }, node.name);
  const made = el("article", { class: `card ${node.state}` }, el("h3", {}, title, el("span", {}, told)));
  if (!small && node.state !== "dead") made.append(el("p", { class: "what" }, kindOf(node).slice(1).replace(/ nodes$/, " node")));
  const sets = el("div", { class: "sets" });
  for (const [heading, gpus, linked] of setsOf(node)) sets.append(set(node, heading, gpus, linked, small));
  if (node.gpu_count) made.append(sets);
  if (node.others_unlocated)
    made.append(el("p", { class: "egress" }, `other Ray users hold ${node.others_unlocated} more, which are not known yet`));
  if (!small) made.append(whoOn(node));
  for (const one of node.egress)
    made.append(el("p", { class: "egress" }, `${one.resource}: ${one.held} of ${one.total} requests`,
      el("meter", { min: 0, max: one.total, value: one.held, "aria-label": `${one.resource} in use` })));
  if (node.cpus.held) made.append(el("p", { class: "egress" }, `CPUs: ${node.cpus.held} of ${node.cpus.total}`));
  if (node.problem && node.state !== "dead") made.append(el("p", { class: "problem" }, node.problem));
  return made;
}

// Each island with more than one GPU, lone GPUs together, MIG instances by profile, then what is unknown.
function setsOf(node) {
  const machine = machineOf(node), found = [];
  const islands = wholeIslands(node), lone = islands.filter((one) => one.length === 1).flat();
  for (const island of islands.filter((one) => one.length > 1)) {
    const kinds = new Set(machine.links.filter(([a, b]) => island.includes(a) && island.includes(b)).map(([, , n]) => `NV${n}`));
    const how = !node.topology_known ? "links unknown" : node.nvswitch ? "NVSwitch" : "NVLink";
    found.push([[how, [...kinds].sort().join(", ")], island, node.topology_known]);
  }
  if (lone.length) found.push([[node.topology_known ? "no NVLink" : "links unknown", ""], lone, false]);
  const profiles = new Map();
  node.gpus.forEach(([, mig, problem], at) => {
    if (mig === null && !problem) return;
    const key = problem ? "unknown" : `MIG ${mig}`;
    profiles.set(key, [...(profiles.get(key) || []), at]);
  });
  for (const [profile, slots] of profiles) found.push([[profile, ""], slots, false]);
  return found;
}

function machineOf(node) {
  return entries.get(`machine:${node.machine}`) || { numa: [], links: [], nvswitch: false };
}

function set(node, [how, links], gpus, linked, small) {
  const machine = machineOf(node), sockets = new Map();
  for (const at of gpus) {
    const numa = machine.numa[at] ?? null;
    sockets.set(numa, [...(sockets.get(numa) || []), at]);
  }
  const row = el("div", { class: "sockets" });
  const middle = new Map();
  let x = 0;
  for (const [numa, here] of sockets) {
    const cells = el("div", { class: "row" }, ...here.map((at) => cell(node, at, small)));
    for (const at of here) { middle.set(at, x + CELL / 2); x += CELL + GAP; }
    x += SOCKET_GAP - GAP;
    row.append(el("div", { class: "socket" }, cells, numa === null || small ? "" : el("small", {}, `NUMA ${numa}`)));
  }
  const made = el("div", { class: linked ? "set" : "set plain", role: "group", "aria-label": `${how} ${links}: GPU ${ordinals(gpus)}` });
  if (!small) made.append(el("div", { class: "title" }, linked ? el("b", {}, how) : how, links && ` ${links}`));
  if (linked && !small) {
    const links = machine.links.filter(([a, b]) => middle.has(a) && middle.has(b));
    made.append(node.nvswitch ? bar(middle, x - SOCKET_GAP) : arcs(links, middle, x - SOCKET_GAP));
  }
  made.append(row);
  return made;
}

// An NVSwitch, and each GPU's way to it.
function bar(middle, width) {
  const drawn = shape("svg", { class: "links", width, height: 15, "aria-hidden": "true" });
  drawn.append(shape("rect", { x: 0, y: 1, width, height: 5, rx: 2, fill: "currentColor" }));
  for (const x of middle.values()) drawn.append(shape("line", { x1: x, x2: x, y1: 5, y2: 15, stroke: "currentColor", "stroke-width": 4 }));
  return drawn;
}

// NVLinks as arcs, the thicker the more links there are.
function arcs(links, middle, width) {
  const height = (a, b) => 6 + 36 * Math.sqrt(Math.abs(middle.get(a) - middle.get(b)) / 480);
  const tall = Math.max(0, ...links.map(([a, b]) => height(a, b))) + 4;
  const drawn = shape("svg", { class: "links", width, height: tall, "aria-hidden": "true" });
  for (const [a, b, count] of links) {
    const [x, y, top] = [middle.get(a), middle.get(b), tall - (height(a, b) * 4) / 3];
    drawn.append(shape("path", {
      d: `M ${x} ${tall} C ${x} ${top}, ${y} ${top}, ${y} ${tall}`,
      fill: "none", stroke: "currentColor", "stroke-width": Math.min(0.8 + 0.7 * count, 5),
    }));
  }
  return drawn;
}

// What a GPU looks like: class, letter and words, so that nothing rests on colour alone.
function look(node, at) {
  const [state, , problem, who] = node.gpus[at];
  const used = who.reduce((sum, one) => sum + one[2], 0);
  const names = who.map(([name, replica, share]) => `${name}/${replica}${share < 1 ? ` ${Math.round(share * 100)} %` : ""}`);
  const suspect = node.suspects.some((one) => one.gpus.includes(at)) ? "!" : "";
  if (node.state === "dead") return { kind: "deadcell", mark: "×", text: names.join(", ") || "node died", words: `lost with its node${names.length ? `: ${names.join(", ")}` : ""}` };
  if (problem || !["free", "held", "other"].includes(state))
    return { kind: "odd", mark: "?", text: problem ? "lost" : state, words: problem || state };
  if (state === "other") return { kind: "other", mark: `–${suspect}`, text: "other", words: "held by another Ray user" };
  if (state === "free") return { kind: "free", mark: suspect, text: "free", words: `free${suspect && ", suspect"}` };
  const shared = used < 0.9995 || who.length > 1;
  return {
    kind: shared ? "held shared" : "held", used, mark: shared ? "◐" : who[0][0].slice(0, 1).toUpperCase(),
    corner: shared ? "◐" : `/${who[0][1]}`, text: shared ? `${Math.round(used * 100)} %` : who[0][0], words: `${shared ? "shared by" : "held by"} ${names.join(", ")}${suspect && ", suspect"}`,
  };
}

function cell(node, at, small) {
  const seen = look(node, at), label = `${node.gpus[at][1] === null ? "GPU" : "slot"} ${at} of ${node.name}: ${seen.words}`;
  const made = el("button", {
    class: `cell ${seen.kind}`, type: "button", "data-at": `gpu-${at}`, "data-node": node.id, "aria-label": label, tabindex: "-1",
  });
  if (small) made.textContent = seen.mark;
  else made.append(el("b", {}, `${at}`), el("i", {}, seen.text), el("span", { class: "mark" }, seen.corner ?? seen.mark));
  if (seen.used !== undefined) made.style.setProperty("--used", `${Math.round(seen.used * 100)}%`);
  return made;
}

// One listener for thousands of cells; and what a cell says to a screen reader, it says to a mouse, too.
$("map").addEventListener("click", (event) => {
  const one = event.target.closest("button");
  if (!one) return;
  const node = one.dataset.node, at = one.dataset.at;
  show(at === "name" ? { kind: "node", node } : { kind: "gpu", node, gpu: Number(at.slice(4)) });
});
$("map").addEventListener("mouseover", (event) => {
  const one = event.target.closest("button.cell");
  if (one && !one.title) one.title = one.getAttribute("aria-label");
});

// Who is on a node; replicas of one deployment whose bandwidth is nobody's question share a line.
function whoOn(node) {
  const lines = new Map();
  for (const [one, a] of assignmentsOn.get(node.id) || []) {
    const alone = a.bandwidth_gb_per_s === undefined && a.share === 1 && a.gpus.length && !a.mig;
    const key = alone ? one.name : `${one.name}/${a.replica_index}/${a.gpus}`;
    if (!lines.has(key)) lines.set(key, { name: one.name, replicas: [], a: { ...a, gpus: [] } });
    lines.get(key).replicas.push(a.replica_index);
    lines.get(key).a.gpus.push(...a.gpus);
  }
  const list = el("ul", { class: "who" });
  for (const { name, replicas, a } of lines.values())
    list.append(el("li", {}, el("b", {}, `${name}/${ordinals(replicas)}`), el("span", {}, [holds(a), bandwidth(a)].filter(Boolean).join("  ·  "))));
  return list;
}

function legend() {
  const shown = [
    ["free", "", "free"], ["held", "L", "placed"], ["held shared", "◐", "shared"],
    ["other", "–", "another Ray user"], ["odd", "?", "unknown or lost"], ["deadcell", "×", "lost with its node"],
  ];
  for (const [kind, mark, text] of shown) {
    const sample = el("span", { class: `cell ${kind}`, "aria-hidden": "true" }, el("span", { class: "mark" }, mark));
    sample.style.setProperty("--used", "60%");
    document.querySelector(".legend").append(el("span", {}, sample, text));
  }
  document.querySelector(".legend").append(el("span", {}, el("span", { class: "set", "aria-hidden": "true" }), "NVLink island"));
}

// -- keyboard: the map is one stop of Tab, and arrows go through it -------------------------------------

let stop = null; // [node id, data-at]

const stops = () => [...$("map").querySelectorAll("button")];
const stopNow = () => $("map").querySelector('button[tabindex="0"]');

function rove() {
  if (stopNow()) return;
  const found = stop && stops().find((one) => one.dataset.node === stop[0] && one.dataset.at === stop[1]);
  const next = found || $("map").querySelector("button");
  if (next) next.tabIndex = 0;
}

$("map").addEventListener("focusin", (event) => {
  if (!event.target.dataset.at) return;
  if (stopNow()) stopNow().tabIndex = -1;
  event.target.tabIndex = 0;
  stop = [event.target.dataset.node, event.target.dataset.at];
});

$("map").addEventListener("keydown", (event) => {
  if (!event.target.dataset.at || event.ctrlKey || event.altKey || event.metaKey) return;
  const all = stops(), at = all.indexOf(event.target), mine = event.target.dataset.node;
  const here = all.filter((one) => one.dataset.node === mine);
  const step = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: all.indexOf(here[0]), End: all.indexOf(here[here.length - 1]) };
  let next = all[step[event.key]];
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    const heads = all.filter((one) => one.dataset.at === "name"), head = heads.findIndex((one) => one.dataset.node === mine);
    const other = heads[head + (event.key === "ArrowDown" ? 1 : -1)];
    const there = other ? all.filter((one) => one.dataset.node === other.dataset.node) : [];
    next = there[Math.min(here.indexOf(event.target), there.length - 1)];
  }
  if (!next) return;
  event.preventDefault();
  next.focus();
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && open.kind) hide();
  if (event.key === "/" && !/^(INPUT|TEXTAREA)$/.test(document.activeElement.tagName)) {
    event.preventDefault();
    $("filter").focus();
  }
});

// -- lists -------------------------------------------------------------------------------------------

function drawLists() {
  const all = every("deployment"), wanted = words();
  const matches = (one) => {
    const text = [one.name, one.model, one.runtime, one.state, one.group, ...one.assignments.map((a) => a.node_name)].join(" ").toLowerCase();
    return wanted.every((word) => text.includes(word));
  };
  const listed = all.filter(matches).sort((a, b) => BY_NAME(a.name, b.name));
  fill($("deployments").querySelector("ul"), listed.map((one) => [one.name, one]), deploymentRow);
  $("deployments").querySelector(".none").hidden = listed.length > 0;
  say($("deployments").querySelector(".none"), all.length ? "No deployment is like that." : "Nothing is declared; try `placement apply FILE`.", "none");

  const last = all.length + 1;
  const waiting = all.filter((one) => one.queue_position || notPlaced(one).length || one.outdated.length);
  waiting.sort((a, b) => (a.queue_position || last) - (b.queue_position || last));
  const rows = waiting.map((one) => [one.name, one]);
  for (const one of every("unreadable")) rows.push([`unreadable:${one.name}`, one]);
  $("waiting").hidden = rows.length === 0 && !(entries.get("demand") || []).length;
  const asked = (entries.get("demand") || []).map((row) => [`asked:${row.deployment}/${row.replica}`, row]);
  fill($("waiting").querySelector("ol"), [...rows, ...asked], waitingRow);

  const events = every("event").sort((a, b) => b.number - a.number).slice(0, EVENTS);
  fill($("events").querySelector("ul"), events.map((one) => [`${one.number}`, one]), eventRow);
  $("events").querySelector(".none").hidden = events.length > 0;

  const nodes = every("node").filter(isShown).length, cards = document.querySelectorAll(".card").length;
  say($("found"), wanted.length ? `${cards} of ${counted(nodes, "node")}, ${listed.length} of ${counted(all.length, "deployment")}` : "");
  markChosen();
}

const opens = (name) => () => show({ kind: "deployment", name });

function deploymentRow(one) {
  const placed = new Set(one.assignments.map((a) => a.replica_index)).size;
  const slowest = one.assignments.filter((a) => a.bandwidth_gb_per_s !== undefined).sort((a, b) => a.bandwidth_gb_per_s - b.bandwidth_gb_per_s)[0];
  return el("li", {}, el("button", { type: "button", "data-at": "open", "data-deployment": one.name, "aria-pressed": "false", on: opens(one.name) },
    el("b", {}, one.name), el("span", {}, `${placed}/${one.replicas} `, el("span", { class: `state ${one.state}` }, one.state)),
    el("small", {}, [one.model, slowest && bandwidth(slowest)].filter(Boolean).join("  ·  "))));
}

function waitingRow(one) {
  if (one.problem) return el("li", {}, el("b", {}, one.name), el("small", {}, one.problem));
  if (one.asked !== undefined)
    return el("li", {}, el("button", { type: "button", "data-at": "open", on: opens(one.deployment) },
      el("b", {}, `${one.deployment}/${one.replica}`), el("span", {}, one.state),
      el("small", {}, `asked of the autoscaler: ${one.asked}${one.reason ? `: ${one.reason}` : ""}`)));
  const states = new Map();
  for (const { index, state, reason } of notPlaced(one)) {
    const key = JSON.stringify([state, reason]);
    states.set(key, [...(states.get(key) || []), index]);
  }
  const reasons = [...states].map(([key, indices]) => {
    const [state, reason] = JSON.parse(key);
    return `replica ${ordinals(indices)} ${state}${reason ? `: ${reason}` : ""}`;
  });
  if (one.outdated.length) reasons.push(`replica ${ordinals(one.outdated)} as declared before, until there is room`);
  return el("li", {}, el("button", { type: "button", "data-at": "open", on: opens(one.name) },
    el("b", {}, `${one.queue_position ? `${one.queue_position}. ` : ""}${one.name}`), el("span", {}), el("small", {}, reasons.join("; "))));
}

function eventRow(one) {
  const who = one.replica === null ? one.deployment : `${one.deployment}/${one.replica}`;
  const clock = new Date(one.at * 1000).toLocaleTimeString([], { hour12: false });
  return el("li", {}, el("button", { type: "button", "data-at": "open", on: () => show({ kind: "event", number: one.number }) },
    el("b", {}, who), el("time", { datetime: one.time }, clock),
    el("small", {}, el("span", { class: `state ${one.state}` }, one.state), ` ${one.text}`)));
}

// -- details -----------------------------------------------------------------------------------------

let open = {}, opener = null, drawnOf = null;
const facts = new Map(); // path -> {value} or {error}

function show(what) {
  opener = document.activeElement;
  open = what;
  drawnOf = null;
  facts.clear();
  $("detail").hidden = false;
  drawDetail();
  $("detail-title").focus();
  if (!matchMedia("(max-width: 899px)").matches) document.querySelector("aside").scrollTop = 0;
  markChosen();
}

function hide() {
  open = {};
  $("detail").hidden = true;
  markChosen();
  const again = opener && (opener.isConnected ? opener
    : stops().find((one) => one.dataset.node === opener.dataset.node && one.dataset.at === opener.dataset.at));
  (again || stopNow() || $("filter")).focus();
}

// The GPUs of what is shown are marked on the map.
function markChosen() {
  for (const one of document.querySelectorAll(".chosen")) one.classList.remove("chosen");
  for (const one of document.querySelectorAll("[data-deployment]"))
    one.setAttribute("aria-pressed", `${open.kind === "deployment" && one.dataset.deployment === open.name}`);
  const mark = (node, at) => {
    const found = $("map").querySelector(`[data-node="${CSS.escape(node)}"][data-at="gpu-${at}"]`);
    if (found) found.classList.add("chosen");
  };
  if (open.kind === "gpu") mark(open.node, open.gpu);
  const one = open.kind === "deployment" && entries.get(`deployment:${open.name}`);
  if (one) for (const a of one.assignments) for (const at of a.gpus) mark(a.node, at);
}

// Asks the server once while a detail is open.
function asked(path) {
  if (!facts.has(path)) {
    facts.set(path, {});
    fetch(path).then((answer) => answer.json()).then(
      (value) => facts.set(path, value.error ? { error: value.error.message } : { value }),
      () => facts.set(path, { error: "no answer" }),
    ).then(() => { drawnOf = null; if (open.kind) drawDetail(); });
  }
  return facts.get(path);
}

function drawDetail() {
  const of = open.kind === "deployment" ? entries.get(`deployment:${open.name}`)
    : open.kind === "event" ? entries.get(`event:${open.number}`) : entries.get(`node:${open.node}`);
  if (drawnOf !== null && drawnOf === of) return;
  drawnOf = of ?? null;
  const [title, parts] = of === undefined ? ["gone", [el("p", {}, "It is there no longer.")]]
    : { deployment: deploymentDetail, event: eventDetail, node: nodeDetail, gpu: gpuDetail }[open.kind](of);
  say($("detail-title"), title);
  const at = focusIn($("detail-body"));
  $("detail-body").replaceChildren(...parts.filter(Boolean));
  focusAgain($("detail-body"), at);
}

function pairs(rows) {
  return el("dl", {}, ...rows.filter(([, value]) => value !== null && value !== undefined && value !== "")
    .flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value instanceof Node ? value : `${value}`)]));
}

function table(caption, headings, rows) {
  return el("table", { "aria-label": caption }, el("thead", {}, el("tr", {}, ...headings.map((one) => el("th", { scope: "col" }, one)))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((one) => el("td", {}, one))))));
}

const link = (text, what) => el("button", { class: "link", type: "button", "data-at": `${text} ${JSON.stringify(what)}`, on: () => show(what) }, text);

function deploymentDetail(one) {
  const replicas = one.assignments.map((a) => [`${a.replica_index}`, link(a.node_name, { kind: "node", node: a.node }), holds(a), bandwidth(a) || "-",
    (a.ray_gpus || []).length > 1 ? `GPU ${ordinals(a.ray_gpus)}${a.ray_bandwidth_gb_per_s === undefined ? "" : `, ${rate(a.ray_bandwidth_gb_per_s)} GB/s`}` : "-"]);
  const parts = [
    pairs([["state", one.state], ["model", one.model], ["runs on", `${one.runtime} (${one.runtime_from})`], ["group", one.group],
      ["owner", ownerText(one.owner)], ["declared", `${new Date(one.since * 1000).toLocaleString()}, generation ${one.generation}`],
      ["in the queue", one.queue_position && `number ${one.queue_position}`]]),
    el("h3", {}, `Replicas: ${new Set(one.assignments.map((a) => a.replica_index)).size} of ${one.replicas} placed`),
    replicas.length ? table("replicas", ["", "node", "holds", "all-reduce", "Ray alone"], replicas) : null,
  ];
  const missing = notPlaced(one);
  for (const { index, state, reason } of missing)
    parts.push(el("p", {}, el("b", { class: `state ${state}` }, `replica ${index} ${state}`), reason ? `: ${reason}` : ""));
  if (missing.some((each) => each.state === "pending")) parts.push(...whyNot(one.name));
  const group = one.group && entries.get(`group:${one.group}`);
  if (group) parts.push(el("h3", {}, `Group ${group.name}: ${group.state}`), pairs(Object.entries(group.members).map(([name]) => [name, link("open", { kind: "deployment", name })])));
  return [one.name, parts];
}

function whyNot(name) {
  const path = `why/${encodeURIComponent(name)}`, title = el("h3", {}, "Why not?");
  if (!facts.has(path))
    return [title, el("button", { type: "button", "data-at": "why", on: () => { asked(path); drawnOf = null; drawDetail(); } }, "Ask each node now")];
  const { value, error } = facts.get(path);
  if (error) return [title, el("p", {}, error)];
  if (!value) return [title, el("p", { "data-at": "why", tabindex: "-1" }, "asking …")];
  const { nodes, stages, nearest_miss: miss, advice } = value.explanation;
  const rows = stages.map((stage) => [stage.name, `${stage.kept}`, Object.entries(stage.excluded).map(([reason, count]) => `${count}: ${reason}`).join("; ")]);
  return [title, el("p", { "data-at": "why", tabindex: "-1" }, value.refusal ? `Of ${counted(nodes, "node")}:` : "It would fit now."),
    table("stages", ["stage", "left", "excluded"], rows),
    miss ? el("p", {}, `Nearest miss: ${miss}`) : null, advice ? el("p", {}, `What would help: ${advice}`) : null].filter(Boolean);
}

function eventDetail(one) {
  const known = entries.has(`deployment:${one.deployment}`);
  const title = `${one.deployment}${one.replica === null ? "" : `/${one.replica}`} ${one.state}`;
  return [title, [el("p", {}, one.text || "no more is known"), pairs([["at", new Date(one.at * 1000).toLocaleString()],
    ["deployment", known ? link(one.deployment, { kind: "deployment", name: one.deployment }) : `${one.deployment}, which is gone`]]),
    ...(known && ["refused", "pending", "given up"].includes(one.state) ? whyNot(one.deployment) : [])]];
}

function nodeDetail(node) {
  const who = (assignmentsOn.get(node.id) || []).map(([one, a]) => [link(`${one.name}/${a.replica_index}`, { kind: "deployment", name: one.name }), holds(a), bandwidth(a) || "-"]);
  const parts = [
    pairs([["state", node.state], ["address", node.address], ["GPUs", node.gpu_count ? kindOf(node).slice(1) : "none"], ["topology", node.topology],
      ["CPUs", `${node.cpus.total}, ${node.cpus.held} of them placed`], ["id", node.id], ["problem", node.problem]]),
    who.length ? table("who is on it", ["replica", "holds", "all-reduce"], who) : el("p", {}, "Nothing is placed on it."),
  ];
  if (node.gpu_count && node.state !== "dead") {
    const { value, error } = asked(`nodes/${encodeURIComponent(node.id)}`);
    parts.push(el("h3", {}, "Links, as nvidia-smi topo -m shows them"), value ? el("pre", { tabindex: "0" }, value.matrix) : el("p", {}, error || "reading …"));
  }
  return [`node ${node.name}`, parts];
}

function gpuDetail(node) {
  const at = open.gpu, [, mig, problem, who] = node.gpus[at] || [];
  const parts = [el("p", {}, look(node, at).words)];
  for (const [name, replica, share] of who) {
    const one = entries.get(`deployment:${name}`), a = one && one.assignments.find((each) => each.replica_index === replica && each.node === node.id);
    parts.push(pairs([["replica", link(`${name}/${replica}`, { kind: "deployment", name })], ["holds", a ? holds(a) : `${share}`], ["all-reduce", a && bandwidth(a)]]));
  }
  for (const one of node.suspects.filter((each) => each.gpus.includes(at)))
    parts.push(el("p", { class: "problem" }, `GPU ${ordinals(one.gpus)} measured at ${rate(one.gb_per_s)} of ${rate(one.predicted_gb_per_s)} GB/s`));
  if (node.state !== "dead") {
    const { value, error } = asked(`nodes/${encodeURIComponent(node.id)}`);
    parts.push(el("h3", {}, "What it reports"), value ? gpuFacts(value, at, mig) : el("p", {}, error || "reading …"));
  }
  if (problem) parts.push(el("p", { class: "problem" }, problem));
  parts.push(el("p", {}, link("the whole node", { kind: "node", node: node.id })));
  return [`${mig === null ? "GPU" : "slot"} ${at} of ${node.name}`, parts];
}

function gpuFacts(report, at, mig) {
  const told = report.facts || {}, gpu = (told.gpus || []).find((one) => one.ordinal === at) || {};
  const links = (told.pairs || []).filter((pair) => pair.a === at || pair.b === at).map((pair) => {
    const other = pair.a === at ? pair.b : pair.a;
    return [pair.nvlinks ? `NV${pair.nvlinks}` : pair.common_ancestor, other];
  });
  const by = new Map();
  for (const [kind, other] of links) by.set(kind, [...(by.get(kind) || []), other]);
  const cards = new Map();
  for (const nic of told.nics || []) cards.set(nic.paths[at], [...(cards.get(nic.paths[at]) || []), nic.name]);
  const nics = [...cards].map(([path, names]) => `${path} ${names.join(", ")}`).join("; ");
  const source = { nvml: "NVML", catalogue: "the catalogue", none: "nothing could be read" }[told.source];
  return pairs([
    ["model", gpu.name || report.gpu_model], ["MIG", mig], ["UUID", gpu.uuid], ["PCI bus", gpu.pci_bus_id],
    ["memory", gpu.memory_total_bytes && `${gib(gpu.memory_total_bytes)}${gpu.memory_used_bytes === null ? "" : `, ${gib(gpu.memory_used_bytes)} in use`}`],
    ["compute capability", gpu.compute_capability && gpu.compute_capability.join(".")],
    ["PCIe", gpu.pcie_generation && `${gpu.pcie_generation}.0 x${gpu.pcie_width}`], ["NUMA node", gpu.numa_nodes && ordinals(gpu.numa_nodes)],
    ["CPUs", gpu.cpus && ordinals(gpu.cpus)], ["links", [...by].map(([kind, others]) => `${kind} to ${ordinals(others)}`).join("; ")],
    ["network cards", nics], ["errors", (gpu.errors || []).join("; ")], ["read from", source],
  ]);
}

// ----------------------------------------------------------------------------------------------------

$("close").addEventListener("click", hide);
$("filter").addEventListener("input", () => { drawNodes(); drawLists(); });
legend();
listen();
