// What waits, deployments, and what just happened.
"use strict";

const EVENTS = 60; // so many are listed

function drawLists() {
  const all = every("deployment"),
    wanted = words();
  const matches = (one) => {
    const text = [one.name, one.model, one.runtime, one.state, one.group, ...one.assignments.map((a) => a.node_name)]
      .join(" ")
      .toLowerCase();
    return wanted.every((word) => text.includes(word));
  };
  const listed = all.filter(matches).sort((a, b) => BY_NAME(a.name, b.name));
  fill(
    $("deployments").querySelector("ul"),
    listed.map((one) => [one.name, one]),
    deploymentRow,
  );
  $("deployments").querySelector(".none").hidden = listed.length > 0;
  say(
    $("deployments").querySelector(".none"),
    all.length ? "No deployment is like that." : "Nothing is declared; try `placement apply FILE`.",
    "none",
  );

  const last = all.length + 1;
  const waiting = all.filter((one) => one.queue_position || notPlaced(one).length || one.outdated.length);
  waiting.sort((a, b) => (a.queue_position || last) - (b.queue_position || last));
  const rows = waiting.map((one) => [one.name, one]);
  for (const one of every("unreadable")) rows.push([`unreadable:${one.name}`, one]);
  $("waiting").hidden = rows.length === 0 && !(entries.get("demand") || []).length;
  const asked = (entries.get("demand") || []).map((row) => [`asked:${row.deployment}/${row.replica}`, row]);
  fill($("waiting").querySelector("ol"), [...rows, ...asked], waitingRow);

  const events = every("event")
    .sort((a, b) => b.number - a.number)
    .slice(0, EVENTS);
  fill(
    $("events").querySelector("ul"),
    events.map((one) => [`${one.number}`, one]),
    eventRow,
  );
  $("events").querySelector(".none").hidden = events.length > 0;

  const nodes = every("node").filter(isShown).length,
    cards = document.querySelectorAll(".card").length;
  say(
    $("found"),
    wanted.length
      ? `${cards} of ${counted(nodes, "node")}, ${listed.length} of ${counted(all.length, "deployment")}`
      : "",
  );
  markChosen();
}

const opens = (name) => () => show({ kind: "deployment", name });

function deploymentRow(one) {
  const placed = new Set(one.assignments.map((a) => a.replica_index)).size;
  const slowest = one.assignments
    .filter((a) => a.bandwidth_gb_per_s !== undefined)
    .sort((a, b) => a.bandwidth_gb_per_s - b.bandwidth_gb_per_s)[0];
  return el(
    "li",
    {},
    el(
      "button",
      { type: "button", "data-at": "open", "data-deployment": one.name, "aria-pressed": "false", on: opens(one.name) },
      el("b", {}, one.name),
      el("span", {}, `${placed}/${one.replicas} `, el("span", { class: `state ${one.state}` }, one.state)),
      el("small", {}, [one.model, slowest && bandwidth(slowest)].filter(Boolean).join("  ·  ")),
    ),
  );
}

function waitingRow(one) {
  if (one.problem) return el("li", {}, el("b", {}, one.name), el("small", {}, one.problem));
  if (one.asked !== undefined)
    return el(
      "li",
      {},
      el(
        "button",
        { type: "button", "data-at": "open", on: opens(one.deployment) },
        el("b", {}, `${one.deployment}/${one.replica}`),
        el("span", {}, one.state),
        el("small", {}, `asked of the autoscaler: ${one.asked}${one.reason ? `: ${one.reason}` : ""}`),
      ),
    );
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
  return el(
    "li",
    {},
    el(
      "button",
      { type: "button", "data-at": "open", on: opens(one.name) },
      el("b", {}, `${one.queue_position ? `${one.queue_position}. ` : ""}${one.name}`),
      el("span", {}),
      el("small", {}, reasons.join("; ")),
    ),
  );
}

function eventRow(one) {
  const who = one.replica === null ? one.deployment : `${one.deployment}/${one.replica}`;
  const clock = new Date(one.at * 1000).toLocaleTimeString([], { hour12: false });
  return el(
    "li",
    {},
    el(
      "button",
      { type: "button", "data-at": "open", on: () => show({ kind: "event", number: one.number }) },
      el("b", {}, who),
      el("time", { datetime: one.time }, clock),
      el("small", {}, el("span", { class: `state ${one.state}` }, one.state), ` ${one.text}`),
    ),
  );
}
