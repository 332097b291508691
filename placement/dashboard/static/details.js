// What a click opens.
"use strict";

let open = {},
  opener = null,
  drawnOf = null;
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
  const again =
    opener &&
    (opener.isConnected
      ? opener
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
    fetch(path)
      .then((answer) => answer.json())
      .then(
        (value) => facts.set(path, value.error ? { error: value.error.message } : { value }),
        () => facts.set(path, { error: "no answer" }),
      )
      .then(() => {
        drawnOf = null;
        if (open.kind) drawDetail();
      });
  }
  return facts.get(path);
}

function drawDetail() {
  const of =
    open.kind === "deployment"
      ? entries.get(`deployment:${open.name}`)
      : open.kind === "event"
        ? entries.get(`event:${open.number}`)
        : entries.get(`node:${open.node}`);
  if (drawnOf !== null && drawnOf === of) return;
  drawnOf = of ?? null;
  const [title, parts] =
    of === undefined
      ? ["gone", [el("p", {}, "It is there no longer.")]]
      : { deployment: deploymentDetail, event: eventDetail, node: nodeDetail, gpu: gpuDetail }[open.kind](of);
  say($("detail-title"), title);
  const at = focusIn($("detail-body"));
  $("detail-body").replaceChildren(...parts.filter(Boolean));
  focusAgain($("detail-body"), at);
}

function pairs(rows) {
  return el(
    "dl",
    {},
    ...rows
      .filter(([, value]) => value !== null && value !== undefined && value !== "")
      .flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value instanceof Node ? value : `${value}`)]),
  );
}

function table(caption, headings, rows) {
  return el(
    "table",
    { "aria-label": caption },
    el("thead", {}, el("tr", {}, ...headings.map((one) => el("th", { scope: "col" }, one)))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((one) => el("td", {}, one))))),
  );
}

const link = (text, what) =>
  el(
    "button",
    { class: "link", type: "button", "data-at": `${text} ${JSON.stringify(what)}`, on: () => show(what) },
    text,
  );

function deploymentDetail(one) {
  const replicas = one.assignments.map((a) => [
    `${a.replica_index}`,
    link(a.node_name, { kind: "node", node: a.node }),
    holds(a),
    bandwidth(a) || "-",
    (a.ray_gpus || []).length > 1
      ? `GPU ${ordinals(a.ray_gpus)}${a.ray_bandwidth_gb_per_s === undefined ? "" : `, ${rate(a.ray_bandwidth_gb_per_s)} GB/s`}`
      : "-",
  ]);
  const parts = [
    pairs([
      ["state", one.state],
      ["model", one.model],
      ["runs on", `${one.runtime} (${one.runtime_from})`],
      ["group", one.group],
      ["owner", ownerText(one.owner)],
      ["declared", `${new Date(one.since * 1000).toLocaleString()}, generation ${one.generation}`],
      ["in the queue", one.queue_position && `number ${one.queue_position}`],
    ]),
    el("h3", {}, `Replicas: ${new Set(one.assignments.map((a) => a.replica_index)).size} of ${one.replicas} placed`),
    replicas.length ? table("replicas", ["", "node", "holds", "all-reduce", "Ray alone"], replicas) : null,
  ];
  const missing = notPlaced(one);
  for (const { index, state, reason } of missing)
    parts.push(
      el("p", {}, el("b", { class: `state ${state}` }, `replica ${index} ${state}`), reason ? `: ${reason}` : ""),
    );
  if (missing.some((each) => each.state === "pending")) parts.push(...whyNot(one.name));
  const group = one.group && entries.get(`group:${one.group}`);
  if (group)
    parts.push(
      el("h3", {}, `Group ${group.name}: ${group.state}`),
      pairs(Object.entries(group.members).map(([name]) => [name, link("open", { kind: "deployment", name })])),
    );
  return [one.name, parts];
}

function whyNot(name) {
  const path = `why/${encodeURIComponent(name)}`,
    title = el("h3", {}, "Why not?");
  if (!facts.has(path))
    return [
      title,
      el(
        "button",
        {
          type: "button",
          "data-at": "why",
          on: () => {
            asked(path);
            drawnOf = null;
            drawDetail();
          },
        },
        "Ask each node now",
      ),
    ];
  const { value, error } = facts.get(path);
  if (error) return [title, el("p", {}, error)];
  if (!value) return [title, el("p", { "data-at": "why", tabindex: "-1" }, "asking …")];
  const { nodes, stages, nearest_miss: miss, advice } = value.explanation;
  const rows = stages.map((stage) => [
    stage.name,
    `${stage.kept}`,
    Object.entries(stage.excluded)
      .map(([reason, count]) => `${count}: ${reason}`)
      .join("; "),
  ]);
  return [
    title,
    el(
      "p",
      { "data-at": "why", tabindex: "-1" },
      value.refusal ? `Of ${counted(nodes, "node")}:` : "It would fit now.",
    ),
    table("stages", ["stage", "left", "excluded"], rows),
    miss ? el("p", {}, `Nearest miss: ${miss}`) : null,
    advice ? el("p", {}, `What would help: ${advice}`) : null,
  ].filter(Boolean);
}

function eventDetail(one) {
  const known = entries.has(`deployment:${one.deployment}`);
  const title = `${one.deployment}${one.replica === null ? "" : `/${one.replica}`} ${one.state}`;
  return [
    title,
    [
      el("p", {}, one.text || "no more is known"),
      pairs([
        ["at", new Date(one.at * 1000).toLocaleString()],
        [
          "deployment",
          known
            ? link(one.deployment, { kind: "deployment", name: one.deployment })
            : `${one.deployment}, which is gone`,
        ],
      ]),
      ...(known && ["refused", "pending", "given up"].includes(one.state) ? whyNot(one.deployment) : []),
    ],
  ];
}

function nodeDetail(node) {
  const who = (assignmentsOn.get(node.id) || []).map(([one, a]) => [
    link(`${one.name}/${a.replica_index}`, { kind: "deployment", name: one.name }),
    holds(a),
    bandwidth(a) || "-",
  ]);
  const parts = [
    pairs([
      ["state", node.state],
      ["address", node.address],
      ["GPUs", node.gpu_count ? kindOf(node).slice(1) : "none"],
      ["topology", node.topology],
      ["CPUs", `${node.cpus.total}, ${node.cpus.held} of them placed`],
      ["id", node.id],
      ["problem", node.problem],
    ]),
    who.length
      ? table("who is on it", ["replica", "holds", "all-reduce"], who)
      : el("p", {}, "Nothing is placed on it."),
  ];
  if (node.gpu_count && node.state !== "dead") {
    const { value, error } = asked(`nodes/${encodeURIComponent(node.id)}`);
    parts.push(
      el("h3", {}, "Links, as nvidia-smi topo -m shows them"),
      value ? el("pre", { tabindex: "0" }, value.matrix) : el("p", {}, error || "reading …"),
    );
  }
  return [`node ${node.name}`, parts];
}

function gpuDetail(node) {
  const at = open.gpu,
    [, mig, problem, who] = node.gpus[at] || [];
  const parts = [el("p", {}, look(node, at).words)];
  for (const [name, replica, share] of who) {
    const one = entries.get(`deployment:${name}`),
      a = one && one.assignments.find((each) => each.replica_index === replica && each.node === node.id);
    parts.push(
      pairs([
        ["replica", link(`${name}/${replica}`, { kind: "deployment", name })],
        ["holds", a ? holds(a) : `${share}`],
        ["all-reduce", a && bandwidth(a)],
      ]),
    );
  }
  for (const one of node.suspects.filter((each) => each.gpus.includes(at)))
    parts.push(
      el(
        "p",
        { class: "problem" },
        `GPU ${ordinals(one.gpus)} measured at ${rate(one.gb_per_s)} of ${rate(one.predicted_gb_per_s)} GB/s`,
      ),
    );
  if (node.state !== "dead") {
    const { value, error } = asked(`nodes/${encodeURIComponent(node.id)}`);
    parts.push(el("h3", {}, "What it reports"), value ? gpuFacts(value, at, mig) : el("p", {}, error || "reading …"));
  }
  if (problem) parts.push(el("p", { class: "problem" }, problem));
  parts.push(el("p", {}, link("the whole node", { kind: "node", node: node.id })));
  return [`${mig === null ? "GPU" : "slot"} ${at} of ${node.name}`, parts];
}

function gpuFacts(report, at, mig) {
  const told = report.facts || {},
    gpu = (told.gpus || []).find((one) => one.ordinal === at) || {};
  const links = (told.pairs || [])
    .filter((pair) => pair.a === at || pair.b === at)
    .map((pair) => {
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
    ["model", gpu.name || report.gpu_model],
    ["MIG", mig],
    ["UUID", gpu.uuid],
    ["PCI bus", gpu.pci_bus_id],
    [
      "memory",
      gpu.memory_total_bytes &&
        `${gib(gpu.memory_total_bytes)}${gpu.memory_used_bytes === null ? "" : `, ${gib(gpu.memory_used_bytes)} in use`}`,
    ],
    ["compute capability", gpu.compute_capability && gpu.compute_capability.join(".")],
    ["PCIe", gpu.pcie_generation && `${gpu.pcie_generation}.0 x${gpu.pcie_width}`],
    ["NUMA node", gpu.numa_nodes && ordinals(gpu.numa_nodes)],
    ["CPUs", gpu.cpus && ordinals(gpu.cpus)],
    ["links", [...by].map(([kind, others]) => `${kind} to ${ordinals(others)}`).join("; ")],
    ["network cards", nics],
    ["errors", (gpu.errors || []).join("; ")],
    ["read from", source],
  ]);
}
