// The data of a page of results: what the run wrote, which of it the filters choose, and how masks are drawn.
//
// The run writes scripts that call these functions:
//   comask.summary({classes, colors, thresholds, failures, facts, whole})
//     classes, colors: the name and the colour of each label; thresholds: one number, or one per label;
//     failures: [{file, error}]; facts: {name: text}; whole: whether all inputs were run.
//   comask.results({numbers, names, sizes, counts, labels, scores, areas, videos})
//     numbers, names, sizes: of each entry, an image or a video; sizes: [width, height] in pixels;
//     counts: how many instances it has; labels, scores, areas: of all instances, one entry's after the
//     other's, base64 of little-endian u32, f32 and u32; areas in pixels;
//     videos: {number: {frames, seconds, best: [[label, highest score]], overlay: address or null}}.
//   comask.details(number, {size, boxes, masks, timeline})
//     size: [width, height] of the view; boxes: [[x1, y1, x2, y2]] in pixels of the image; masks: for each
//     instance its outlines in pixels of the view (see `outline`); timeline: of a video, see
//     comask/timeline.py.
"use strict";

const comask = (() => {
  const SMALL = 32 ** 2, LARGE = 96 ** 2; // COCO's limits of an area in pixels
  const AREAS = { "": [0, Infinity], small: [0, SMALL], medium: [SMALL, LARGE], large: [LARGE, Infinity] };
  const MOST_KEPT = 400; // details of entries that stay in memory
  const folder = document.currentScript.src.replace(/[^/]*$/, "");

  const entries = [];
  const parts = { labels: [], scores: [], areas: [] };
  let summary, labels, scores, areas;
  const kept = new Map(); // number → a promise of the entry's details
  const waiting = new Map(); // number → what ends that promise

  function results(part) {
    const columns = { labels: Uint32Array, scores: Float32Array, areas: Uint32Array };
    for (const [name, Kind] of Object.entries(columns)) {
      const text = atob(part[name]), bytes = new Uint8Array(text.length);
      for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
      parts[name].push(new Kind(bytes.buffer));
    }
    let start = entries.length ? entries[entries.length - 1].end : 0;
    for (let i = 0; i < part.numbers.length; i++) {
      const [width, height] = part.sizes[i], end = start + part.counts[i];
      const number = part.numbers[i], video = part.videos[number];
      entries.push({ number, name: part.names[i], lower: part.names[i].toLowerCase(), width, height, start,
        end, video, order: entries.length, count: 0, best: 0, worst: 0, largest: 0, smallest: 0 });
      start = end;
    }
  }

  // Joins what came in parts. Call it once, after the last part.
  function complete() {
    const joined = (Kind, arrays) => {
      const whole = new Kind(arrays.reduce((length, array) => length + array.length, 0));
      let place = 0;
      for (const array of arrays) {
        whole.set(array, place);
        place += array.length;
      }
      return whole;
    };
    labels = joined(Uint32Array, parts.labels);
    scores = joined(Float32Array, parts.scores);
    areas = joined(Uint32Array, parts.areas);
    for (const name of Object.keys(parts)) parts[name] = [];
  }

  // ---- Filters ----

  // What is chosen: `classes` are the labels, null for all; `own` takes each class's own threshold, else
  // `score` is that of all.
  const filter = { text: "", classes: null, score: 0, own: false, area: "", which: "all", sort: "run" };
  const passing = { limits: new Float32Array(0), from: 0, below: Infinity };

  function usesOwnThresholds() {
    return Array.isArray(summary.thresholds);
  }

  // The lowest score of each label, Infinity where the class is not chosen. Scores are 32-bit numbers, and
  // limits must be rounded likewise, or an instance of exactly this score would be left out.
  function limits({ anyClass = false } = {}) {
    return Float32Array.from(summary.classes, (_, label) => {
      if (!anyClass && filter.classes && !filter.classes.has(label)) return Infinity;
      return filter.own ? summary.thresholds[label] : filter.score;
    });
  }

  // Whether an instance is shown; `i` counts the instances of all entries.
  function passes(i) {
    return scores[i] >= passing.limits[labels[i]] && areas[i] >= passing.from && areas[i] < passing.below;
  }

  const ORDERS = {
    run: (a, b) => a.order - b.order,
    most: (a, b) => b.count - a.count,
    best: (a, b) => b.best - a.best,
    worst: (a, b) => (a.count ? a.worst : 2) - (b.count ? b.worst : 2),
    largest: (a, b) => b.largest - a.largest,
    smallest: (a, b) => (a.count ? a.smallest : Infinity) - (b.count ? b.smallest : Infinity) || 0,
    name: (a, b) => a.rank - b.rank,
  };

  function rankNames() {
    if (!entries.length || entries[0].rank !== undefined) return;
    const compare = new Intl.Collator(undefined, { numeric: true }).compare;
    [...entries].sort((a, b) => compare(a.name, b.name)).forEach((entry, rank) => { entry.rank = rank; });
  }

  // Returns the entries that the filters choose, in order, the number of their instances that pass, and the
  // number of each class's instances that pass when every class is chosen.
  function chosen() {
    passing.limits = limits();
    [passing.from, passing.below] = AREAS[filter.area];
    const anyClass = limits({ anyClass: true });
    const perClass = new Uint32Array(summary.classes.length);
    const text = filter.text.trim().toLowerCase();
    const found = [];
    let instances = 0;
    for (const entry of entries) {
      entry.count = entry.best = entry.largest = 0;
      entry.worst = 1;
      entry.smallest = Infinity;
      if (text && !entry.lower.includes(text)) continue;
      for (let i = entry.start; i < entry.end; i++) {
        if (scores[i] < anyClass[labels[i]] || areas[i] < passing.from || areas[i] >= passing.below) continue;
        perClass[labels[i]]++;
        if (scores[i] < passing.limits[labels[i]]) continue;
        entry.count++;
        entry.best = Math.max(entry.best, scores[i]);
        entry.worst = Math.min(entry.worst, scores[i]);
        entry.largest = Math.max(entry.largest, areas[i]);
        entry.smallest = Math.min(entry.smallest, areas[i]);
      }
      const some = entry.video
        ? entry.video.best.some(([label, best]) => Math.fround(best) >= passing.limits[label])
        : entry.count > 0;
      if (filter.which !== "all" && some !== (filter.which === "with")) continue;
      instances += entry.count;
      found.push(entry);
    }
    if (filter.sort === "name") rankNames();
    if (filter.sort !== "run") found.sort((a, b) => ORDERS[filter.sort](a, b) || ORDERS.run(a, b));
    return { found, instances, perClass };
  }

  // Returns an entry's instances that pass, by falling score.
  function instancesOf(entry) {
    const found = [];
    for (let i = entry.start; i < entry.end; i++) {
      if (passes(i)) found.push({ place: i - entry.start, label: labels[i], score: scores[i], area: areas[i] });
    }
    return found.sort((a, b) => b.score - a.score || a.place - b.place);
  }

  // ---- Details ----

  // Returns a promise of an entry's details, with an array `paths` for `draw`; of null if they are missing.
  function load(number) {
    if (!kept.has(number)) {
      kept.set(number, new Promise((resolve) => {
        const script = document.createElement("script");
        waiting.set(number, resolve);
        script.onload = script.onerror = () => {
          script.remove();
          waiting.delete(number);
          resolve(null); // without effect if the script called `details`
        };
        script.src = `${address(number)}.js`;
        document.head.append(script);
      }));
      if (kept.size > MOST_KEPT) kept.delete(kept.keys().next().value);
    }
    return kept.get(number);
  }

  function details(number, content) {
    waiting.get(number)?.({ ...content, paths: [] });
  }

  // Returns the address of an entry's files, without a suffix.
  function address(number) {
    return folder + String(number).padStart(6, "0");
  }

  // Reads one outline as numbers x, y, x, y, …: COCO's compressed string of counts, five bits a character,
  // lowest bits first, in which from the fourth number on each is the difference to the one two before.
  function outline(text) {
    const numbers = [];
    for (let place = 0; place < text.length;) {
      let number = 0, shift = 0, bits;
      do {
        bits = text.charCodeAt(place++) - 48;
        number |= (bits & 31) << shift;
        shift += 5;
      } while (bits & 32);
      if (bits & 16) number |= -1 << shift;
      if (numbers.length > 2) number += numbers[numbers.length - 2];
      numbers.push(number);
    }
    return numbers;
  }

  // Returns the mask of an instance as a path in pixels of the view; `place` counts the entry's instances.
  function pathOf(found, place) {
    if (!found.paths[place]) {
      const path = (found.paths[place] = new Path2D());
      for (const text of found.masks[place].split(" ")) {
        const numbers = outline(text);
        for (let i = 0; i < numbers.length; i += 2) {
          path[i ? "lineTo" : "moveTo"](numbers[i] + 0.5, numbers[i + 1] + 0.5);
        }
        path.closePath();
      }
    }
    return found.paths[place];
  }

  // Draws instances over a picture of an entry.
  //   width, height: of the canvas in CSS pixels; `over` is the instance to point out, or null.
  function draw(canvas, width, height, entry, found, instances, over = null) {
    const dense = Math.min(window.devicePixelRatio || 1, 2);
    canvas.width = Math.max(1, Math.round(width * dense));
    canvas.height = Math.max(1, Math.round(height * dense));
    const pen = canvas.getContext("2d"), scale = canvas.width / found.size[0];
    pen.scale(scale, canvas.height / found.size[1]);
    pen.lineJoin = pen.lineCap = "round";
    for (const instance of [...instances].reverse()) { // higher scores over lower ones
      if (instance === over) continue;
      paint(pen, pathOf(found, instance.place), summary.colors[instance.label], over ? 0.1 : 0.35, scale, dense);
    }
    if (!over) return;
    paint(pen, pathOf(found, over.place), summary.colors[over.label], 0.5, scale, 2 * dense);
    const [x1, y1, x2, y2] = found.boxes[over.place];
    const [right, down] = [found.size[0] / entry.width, found.size[1] / entry.height];
    pen.strokeStyle = summary.colors[over.label];
    pen.lineWidth = (1.5 * dense) / scale;
    pen.strokeRect(x1 * right, y1 * down, (x2 - x1) * right, (y2 - y1) * down);
  }

  function paint(pen, path, color, opacity, scale, line) {
    pen.globalAlpha = opacity;
    pen.fillStyle = pen.strokeStyle = color;
    pen.fill(path, "evenodd");
    pen.globalAlpha = Math.min(1, opacity + 0.5);
    pen.lineWidth = (1.2 * line) / scale;
    pen.stroke(path);
    pen.globalAlpha = 1;
  }

  function make(name, text = "", className = "") {
    const made = document.createElement(name);
    made.textContent = text;
    made.className = className;
    return made;
  }

  return {
    // for the scripts of the run
    summary(content) { summary = content; },
    results, details,
    // for the page
    complete, entries, filter, usesOwnThresholds, chosen, limits, instancesOf, load, address, pathOf, draw,
    make,
    get classes() { return summary.classes; },
    get colors() { return summary.colors; },
    get thresholds() { return summary.thresholds; },
    get failures() { return summary.failures; },
    get facts() { return summary.facts; },
    get whole() { return summary.whole; },
  };
})();
