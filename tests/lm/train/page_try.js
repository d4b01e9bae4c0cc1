// node page_try.js PAGE.json SCRIPT.js: runs page.js against a document of a few lines and prints what
// was drawn. Nothing may be placed at NaN.
"use strict";
const fs = require("fs");
class Node {
  constructor(name) {
    Object.assign(this, {name, kids: [], attributes: {}, dataset: {}, style: {}, className: ""});
  }
  setAttribute(key, value) {
    this.attributes[key] = value;
    if (String(value).includes("NaN")) throw Error(key + " is " + value);
  }
  appendChild(node) {
    this.kids.push(node);
    return node;
  }
  append(...nodes) {
    this.kids.push(...nodes);
  }
  replaceChildren() {
    this.kids = [];
  }
  remove() {
    figures.forEach((f) => {
      f.kids = f.kids.filter((kid) => kid !== this);
    });
  }
  querySelector(name) {
    return name === "svg" ? this.kids.find((kid) => kid.name === "svg") : {textContent: "title"};
  }
  closest() {
    return null;
  }
  setPointerCapture() {}
  getBoundingClientRect() {
    return {left: 0, top: 0, width: 600, height: 200};
  }
  get classList() {
    return {contains: () => false, toggle: () => {}};
  }
  all(name) {
    return this.kids.flatMap((kid) =>
      (kid.name === name ? [kid] : []).concat(kid.all ? kid.all(name) : [])
    );
  }
  get text() {
    return (this.textContent ?? "") + this.kids.map((kid) => kid.text ?? kid).join(" ");
  }
}
const PAGE = JSON.parse(fs.readFileSync(process.argv[2]));
const figures = PAGE.figures.map((key) =>
  Object.assign(new Node("figure"), {dataset: {key}, clientWidth: 600})
);
const named = {
  data: {textContent: JSON.stringify(PAGE.data)},
  tip: new Node("div"),
  x: {value: "step"},
  smooth: {value: "0"},
  log: {checked: false},
  clip: {checked: true}
};
const buttons = PAGE.data.runs.map((run) =>
  Object.assign(new Node("button"), {dataset: {run: run.name}})
);
global.document = {
  getElementById: (id) => named[id],
  createElementNS: (_, name) => new Node(name),
  createElement: (name) => new Node(name),
  querySelectorAll: (what) =>
    what.startsWith("figure") ? figures : what.startsWith("button") ? buttons : []
};
Object.assign(global, {addEventListener() {}, innerWidth: 1000, innerHeight: 800});
const lines = () => figures[0].all("polyline").length;
const set = (id, value) => {
  Object.assign(named[id], value);
  named[id].oninput();
};
new Function(fs.readFileSync(process.argv[3], "utf8"))();
const seen = {
  all: lines(),
  crosses: figures[0].all("text").filter((node) => node.textContent === "×").length
};
set("smooth", {value: "90"});
seen.smooth = lines();
for (const x of ["tokens", "time", "step"]) set("x", {value: x});
set("log", {checked: true});
set("clip", {checked: false});
let svg = figures[0].querySelector("svg");
svg.onpointerdown({clientX: 200, clientY: 50, pointerId: 1});
svg.onpointermove({clientX: 400, clientY: 50});
svg.onpointerup({clientX: 400, clientY: 50});
svg = figures[0].querySelector("svg");
svg.onpointermove({clientX: 300, clientY: 50});
seen.tip = named.tip.text;
svg.ondblclick();
buttons[0].onclick();
seen.hidden = lines();
console.log(JSON.stringify(seen));
