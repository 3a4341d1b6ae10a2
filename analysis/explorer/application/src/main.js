// The explorer of samples: opens the study that lies beside index.html, and follows it while it grows.
//
// data.js loads the parts; state.js is the state and its text in the URL; explorer.js draws one data set.

import "./app.css";
import { loadScript, NodeData } from "./data.js";
import { countText, picker } from "./dom.js";
import { Explorer } from "./explorer.js";

const MANIFEST = "data/study.js";
const POLL = 4000; // milliseconds between two looks at a study that is served while it grows
const by = (id) => document.getElementById(id);

let study;
let explorer;

function fail(text) {
  const messages = by("messages");
  messages.textContent = [...notices(), text].filter(Boolean).join("\n");
  messages.hidden = !messages.textContent;
}

/** What the writer of the folder has to say: thinned parts, damaged chunks. */
function notices() {
  const manifest = explorer?.node.manifest;
  return manifest ? [...manifest.damaged.map((words) => `Damaged: ${words}`), ...manifest.notes] : [];
}

function showProgress({ planned, committed, diverged }) {
  const counts = planned > committed ? `${countText(committed)} of ${countText(planned)}` : countText(committed);
  const runs = `${counts} ${planned === 1 ? "run" : "runs"}`;
  by("progress").textContent = diverged ? `${runs}, ${countText(diverged)} diverged` : runs;
}

async function openNode(name, text) {
  document.documentElement.removeAttribute("data-ready");
  const manifest = study.nodes.find((node) => node.name === name) ?? study.nodes[0];
  showProgress(manifest);
  by("title").textContent = `Samples of ${manifest.name}`;
  document.title = `Samples of ${manifest.name}`;
  const names = study.nodes.map((node) => [node.name, node.name]);
  const nodePicker = names.length > 1 ? [picker("Data set", names, manifest.name, (chosen) => openNode(chosen, "")).node] : [];
  by("pickers").replaceChildren(...nodePicker);
  const node = new NodeData(manifest);
  try {
    await node.load();
    explorer?.close();
    explorer = new Explorer(study, node, text, fail);
    await explorer.open();
  } catch (error) {
    fail(error.message);
    throw error;
  }
  fail("");
  document.documentElement.dataset.ready = "";
}

async function poll() {
  try {
    const next = await loadScript(MANIFEST, { fresh: true });
    const manifest = next.nodes.find((node) => node.name === explorer.node.manifest.name);
    if (manifest && next.root !== study.root) {
      study = next;
      await explorer.grow(study, manifest);
      showProgress(manifest);
      fail("");
    }
  } catch {
    // The server has stopped, or the folder is being written: look again later.
  }
  setTimeout(poll, POLL);
}

async function start() {
  try {
    study = await loadScript(MANIFEST);
  } catch (error) {
    fail(`${error.message}. Copy the whole folder, and open index.html in it.`);
    return;
  }
  if (!study.nodes.length) {
    fail("No run of this study is committed yet.");
    return;
  }
  if (study.report) {
    by("report").href = study.report;
    by("report").hidden = false;
  }
  const text = location.hash.slice(1);
  await openNode(new URLSearchParams(text).get("node"), text);
  window.addEventListener("hashchange", () => {
    const changed = location.hash.slice(1);
    if (changed !== explorer.text) openNode(new URLSearchParams(changed).get("node"), changed);
  });
  window.addEventListener("keydown", (event) => {
    if (event.target.matches("input[type=text], input[type=number]")) return;
    if (event.key === "Escape") by("tools").querySelector("[title^='Clear']").click();
    if (event.key === "z" && (event.ctrlKey || event.metaKey)) explorer.undo();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => explorer.restyle());
  if (location.protocol.startsWith("http")) setTimeout(poll, POLL);
}

start();
