// The map: nodes with their GPUs.
"use strict";

const LARGE = 24; // so many nodes have their links and who sits there drawn; of more each has a few cells
const CELL = 54,
  GAP = 3,
  SOCKET_GAP = 10; // as style.css has them

function isShown(node) {
  return node.gpu_count || node.egress.length || node.cpus.held || node.state === "dead";
}

function kindOf(node) {
  if (node.state === "dead") return "3Dead nodes";
  if (!node.gpu_count) return node.egress.length ? "1Egress nodes" : "2CPU nodes";
  const slots = new Map();
  for (const [, mig, problem] of node.gpus) if (!problem) slots.set(mig, (slots.get(mig) || 0) + 1);
  const whole = slots.get(null) || 0,
    lost = node.gpus.filter((gpu) => gpu[2]).length;
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
  return [
    ...profiles,
    node.name,
    node.address,
    node.gpu_model,
    node.topology,
    node.state,
    node.problem,
    ...states,
    ...who,
    ...egress,
  ]
    .join(" ")
    .toLowerCase();
}

function drawNodes() {
  const nodes = every("node").filter(isShown),
    wanted = words();
  const matches = (text) => wanted.every((word) => text.includes(word));
  const shown = wanted.length ? nodes.filter((node) => matches(nodeText(node))) : nodes;
  const small = nodes.length > LARGE,
    map = $("map");
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
  const order = [...kinds].sort(
    ([a, some], [b, others]) => a[0] - b[0] || gpusOf(others) - gpusOf(some) || BY_NAME(a, b),
  );
  fill(
    map,
    order.map(([kind]) => [kind, kind]),
    (kind) => el("section", { class: "kind" }, el("h2", {}, kind.slice(1), el("small")), el("div", { class: "cards" })),
  );
  order.forEach(([kind, alike], at) => {
    const [heading, cards] = map.children[at].children;
    const free = alike.reduce((sum, node) => sum + freeOn(node), 0);
    const told = counted(alike.length, "node") + (kind[0] === "0" ? `, ${free} of ${gpusOf(alike)} free` : "");
    heading.className = small ? "" : "unseen";
    if (heading.lastChild.textContent !== told) heading.lastChild.textContent = told;
    fill(
      cards,
      alike.map((node) => [node.id, node]),
      (node) => card(node, small),
    );
  });
  $("nothing").hidden = shown.length > 0;
  say($("nothing"), nodes.length ? "No node is like that." : "No node has GPUs or egress yet.");
  rove();
  markChosen();
}

// -- a node ------------------------------------------------------------------------------------------

function card(node, small) {
  const free = freeOn(node);
  const told =
    node.state === "dead"
      ? `died ${age(node.dead_seconds)} ago`
      : `${node.gpu_count ? `${free} free` : ""}${node.state === "draining" ? " draining" : ""}`;
  const title = el(
    "button",
    {
      class: "name",
      type: "button",
      "data-at": "name",
      "data-node": node.id,
      "aria-label": `node ${node.name}${told ? `, ${told}` : ""}`,
      tabindex: "-1",
    },
    node.name,
  );
  const made = el("article", { class: `card ${node.state}` }, el("h3", {}, title, el("span", {}, told)));
  if (!small && node.state !== "dead")
    made.append(
      el(
        "p",
        { class: "what" },
        kindOf(node)
          .slice(1)
          .replace(/ nodes$/, " node"),
      ),
    );
  const sets = el("div", { class: "sets" });
  for (const [heading, gpus, linked] of setsOf(node)) sets.append(set(node, heading, gpus, linked, small));
  if (node.gpu_count) made.append(sets);
  if (node.others_unlocated)
    made.append(
      el("p", { class: "egress" }, `other Ray users hold ${node.others_unlocated} more; which ones is not known yet`),
    );
  if (!small) made.append(whoOn(node));
  for (const one of node.egress)
    made.append(
      el(
        "p",
        { class: "egress" },
        `${one.resource}: ${one.held} of ${one.total} requests`,
        el("meter", { min: 0, max: one.total, value: one.held, "aria-label": `${one.resource} in use` }),
      ),
    );
  if (node.cpus.held) made.append(el("p", { class: "egress" }, `CPUs: ${node.cpus.held} of ${node.cpus.total}`));
  if (node.problem && node.state !== "dead") made.append(el("p", { class: "problem" }, node.problem));
  return made;
}

// Each island with more than one GPU, lone GPUs together, MIG instances by profile, then what is unknown.
function setsOf(node) {
  const machine = machineOf(node),
    found = [];
  const islands = wholeIslands(node),
    lone = islands.filter((one) => one.length === 1).flat();
  for (const island of islands.filter((one) => one.length > 1)) {
    const kinds = new Set(
      machine.links.filter(([a, b]) => island.includes(a) && island.includes(b)).map(([, , n]) => `NV${n}`),
    );
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
  const machine = machineOf(node),
    sockets = new Map();
  for (const at of gpus) {
    const numa = machine.numa[at] ?? null;
    sockets.set(numa, [...(sockets.get(numa) || []), at]);
  }
  const row = el("div", { class: "sockets" });
  const middle = new Map();
  let x = 0;
  for (const [numa, here] of sockets) {
    const cells = el("div", { class: "row" }, ...here.map((at) => cell(node, at, small)));
    for (const at of here) {
      middle.set(at, x + CELL / 2);
      x += CELL + GAP;
    }
    x += SOCKET_GAP - GAP;
    row.append(el("div", { class: "socket" }, cells, numa === null || small ? "" : el("small", {}, `NUMA ${numa}`)));
  }
  const made = el("div", {
    class: linked ? "set" : "set plain",
    role: "group",
    "aria-label": `${how} ${links}: GPU ${ordinals(gpus)}`,
  });
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
  for (const x of middle.values())
    drawn.append(shape("line", { x1: x, x2: x, y1: 5, y2: 15, stroke: "currentColor", "stroke-width": 4 }));
  return drawn;
}

// NVLinks as arcs, the thicker the more links there are.
function arcs(links, middle, width) {
  const height = (a, b) => 6 + 36 * Math.sqrt(Math.abs(middle.get(a) - middle.get(b)) / 480);
  const tall = Math.max(0, ...links.map(([a, b]) => height(a, b))) + 4;
  const drawn = shape("svg", { class: "links", width, height: tall, "aria-hidden": "true" });
  for (const [a, b, count] of links) {
    const [x, y, top] = [middle.get(a), middle.get(b), tall - (height(a, b) * 4) / 3];
    drawn.append(
      shape("path", {
        d: `M ${x} ${tall} C ${x} ${top}, ${y} ${top}, ${y} ${tall}`,
        fill: "none",
        stroke: "currentColor",
        "stroke-width": Math.min(0.8 + 0.7 * count, 5),
      }),
    );
  }
  return drawn;
}

// What a GPU looks like: class, letter and words, so that nothing rests on colour alone.
function look(node, at) {
  const [state, , problem, who] = node.gpus[at];
  const used = who.reduce((sum, one) => sum + one[2], 0);
  const names = who.map(
    ([name, replica, share]) => `${name}/${replica}${share < 1 ? ` ${Math.round(share * 100)} %` : ""}`,
  );
  const suspect = node.suspects.some((one) => one.gpus.includes(at)) ? "!" : "";
  if (node.state === "dead")
    return {
      kind: "deadcell",
      mark: "×",
      text: names.join(", ") || "node died",
      words: `lost with its node${names.length ? `: ${names.join(", ")}` : ""}`,
    };
  if (problem || !["free", "held", "other"].includes(state))
    return { kind: "odd", mark: "?", text: problem ? "lost" : state, words: problem || state };
  if (state === "other")
    return { kind: "other", mark: `–${suspect}`, text: "other", words: "held by another Ray user" };
  if (state === "free" && node.others_unlocated)
    return {
      kind: "odd",
      mark: "?",
      text: "free?",
      words: `free, or one of ${node.others_unlocated} that other Ray users hold on this node; which is not known yet`,
    };
  if (state === "free") return { kind: "free", mark: suspect, text: "free", words: `free${suspect && ", suspect"}` };
  const shared = used < 0.9995 || who.length > 1;
  return {
    kind: shared ? "held shared" : "held",
    used,
    mark: shared ? "◐" : who[0][0].slice(0, 1).toUpperCase(),
    corner: shared ? "◐" : `/${who[0][1]}`,
    text: shared ? `${Math.round(used * 100)} %` : who[0][0],
    words: `${shared ? "shared by" : "held by"} ${names.join(", ")}${suspect && ", suspect"}`,
  };
}

function cell(node, at, small) {
  const seen = look(node, at),
    label = `${node.gpus[at][1] === null ? "GPU" : "slot"} ${at} of ${node.name}: ${seen.words}`;
  const made = el("button", {
    class: `cell ${seen.kind}`,
    type: "button",
    "data-at": `gpu-${at}`,
    "data-node": node.id,
    "aria-label": label,
    tabindex: "-1",
  });
  if (small) made.textContent = seen.mark;
  else
    made.append(el("b", {}, `${at}`), el("i", {}, seen.text), el("span", { class: "mark" }, seen.corner ?? seen.mark));
  if (seen.used !== undefined) made.style.setProperty("--used", `${Math.round(seen.used * 100)}%`);
  return made;
}

// One listener for thousands of cells; and what a cell says to a screen reader, it says to a mouse, too.
$("map").addEventListener("click", (event) => {
  const one = event.target.closest("button");
  if (!one) return;
  const node = one.dataset.node,
    at = one.dataset.at;
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
    const alone = a.bandwidth_gb_per_s === undefined && a.share === 1 && !a.shares && a.gpus.length && !a.mig;
    const key = alone ? one.name : `${one.name}/${a.replica_index}/${a.gpus}`;
    if (!lines.has(key)) lines.set(key, { name: one.name, replicas: [], a: { ...a, gpus: [] } });
    lines.get(key).replicas.push(a.replica_index);
    lines.get(key).a.gpus.push(...a.gpus);
  }
  const list = el("ul", { class: "who" });
  for (const { name, replicas, a } of lines.values())
    list.append(
      el(
        "li",
        {},
        el("b", {}, `${name}/${ordinals(replicas)}`),
        el("span", {}, [holds(a), bandwidth(a)].filter(Boolean).join("  ·  ")),
      ),
    );
  return list;
}

function legend() {
  const shown = [
    ["free", "", "free"],
    ["held", "L", "placed"],
    ["held shared", "◐", "shared"],
    ["other", "–", "another Ray user"],
    ["odd", "?", "unknown or lost"],
    ["deadcell", "×", "lost with its node"],
  ];
  for (const [kind, mark, text] of shown) {
    const sample = el("span", { class: `cell ${kind}`, "aria-hidden": "true" }, el("span", { class: "mark" }, mark));
    sample.style.setProperty("--used", "60%");
    document.querySelector(".legend").append(el("span", {}, sample, text));
  }
  document
    .querySelector(".legend")
    .append(el("span", {}, el("span", { class: "set", "aria-hidden": "true" }), "NVLink island"));
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
  const all = stops(),
    at = all.indexOf(event.target),
    mine = event.target.dataset.node;
  const here = all.filter((one) => one.dataset.node === mine);
  const step = {
    ArrowRight: at + 1,
    ArrowLeft: at - 1,
    Home: all.indexOf(here[0]),
    End: all.indexOf(here[here.length - 1]),
  };
  let next = all[step[event.key]];
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    const heads = all.filter((one) => one.dataset.at === "name"),
      head = heads.findIndex((one) => one.dataset.node === mine);
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
