// Elements and the texts in them. Every text goes through textContent; the page's policy forbids markup made from texts.
"use strict";

const BY_NAME = new Intl.Collator(undefined, { numeric: true }).compare;
const $ = (id) => document.getElementById(id);

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
    const old = had.get(key);
    had.delete(key);
    if (old && old.entry === value) {
      if (at === old) at = old.nextElementSibling;
      else parent.insertBefore(old, at);
      continue;
    }
    const made = make(value),
      focused = old && focusIn(old);
    made.dataset.key = key;
    made.entry = value;
    parent.insertBefore(made, at);
    if (!old) continue;
    if (at === old) at = old.nextElementSibling;
    old.remove();
    focusAgain(made, focused);
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
  const sorted = [...new Set(numbers)].sort((a, b) => a - b),
    runs = [];
  for (const one of sorted) {
    const last = runs[runs.length - 1];
    if (last && one === last[1] + 1) last[1] = one;
    else runs.push([one, one]);
  }
  return runs.map(([a, b]) => (a === b ? `${a}` : `${a}-${b}`)).join(",");
}

function bandwidth(a) {
  if (a.bandwidth_gb_per_s === undefined) return "";
  const upper = a.upper_bandwidth_gb_per_s,
    range = upper && upper > a.bandwidth_gb_per_s;
  const rates = rate(a.bandwidth_gb_per_s) + (range ? `-${rate(upper)}` : "");
  return `${rates} GB/s${a.weakest_link ? `, ${a.weakest_link}` : ""}${a.bandwidth_measured ? ", measured" : ""}`;
}

function holds(a) {
  if (a.egress_resource) return `${counted(a.egress_units, "request")} of ${a.egress_resource}`;
  if (!a.gpus.length) return counted(a.cpus, "CPU");
  if (a.mig) return `${a.mig}, slot ${ordinals(a.gpus)}`;
  const parts = new Map();
  a.gpus.forEach((gpu, rank) => parts.set(gpu, (parts.get(gpu) || 0) + (a.shares ? a.shares[rank] : a.share)));
  const alike = new Map();
  for (const [gpu, part] of parts) alike.set(rate(part), [...(alike.get(rate(part)) || []), gpu]);
  return [...alike]
    .sort(([one], [other]) => other - one)
    .map(([part, gpus]) => `${part < 1 ? `${part} of ` : ""}GPU ${ordinals(gpus)}`)
    .join(", ");
}

function age(seconds) {
  for (const [unit, size] of [
    ["d", 86400],
    ["h", 3600],
    ["m", 60],
  ])
    if (seconds >= size) return `${Math.floor(seconds / size)}${unit}`;
  return `${Math.max(0, Math.floor(seconds))}s`;
}

function ownerText(owner) {
  if (!owner) return "nobody: it stays until it is released";
  return typeof owner === "string" ? owner : [owner.kind, owner.actor || owner.job].filter(Boolean).join(" ");
}

const notPlaced = (one) => one.not_placed;
const gib = (bytes) => (bytes === null || bytes === undefined ? "?" : `${rate(bytes / 2 ** 30)} GiB`);
