// The grid of a page of results and its filters. Only the cards in sight exist, and only they load pictures.
"use strict";

(() => {
  const GAP = 12, CAPTION = 46; // pixels between cards, and of the text below a picture
  const BEYOND = 400; // pixels above and below the window in which cards exist already
  const PAUSE = 60; // milliseconds for which a card stays in sight before it loads, so that a jump loads little

  const at = (id) => document.getElementById(id);
  const grid = at("grid"), form = at("filters"), classList = at("class-list");
  const { filter, make } = comask;
  const cards = new Map(); // place in `found` → element
  let found = [], current = -1, columns = 1, cardWidth = 0, rowHeight = 1, scheduled = false;

  comask.complete();

  // ---- Cards ----

  function layOut() {
    const width = grid.clientWidth, least = width < 600 ? 150 : 220;
    columns = Math.max(1, Math.floor((width + GAP) / (least + GAP)));
    cardWidth = Math.floor((width - GAP * (columns - 1)) / columns);
    rowHeight = Math.round(cardWidth * 0.75) + CAPTION + GAP;
    grid.style.height = `${Math.ceil(found.length / columns) * rowHeight}px`;
    clear();
    render(0);
  }

  function clear() {
    for (const card of cards.values()) card.remove();
    cards.clear();
  }

  // Makes the cards in sight, and removes the others.
  function render(pause) {
    const top = grid.getBoundingClientRect().top;
    const first = Math.max(0, Math.floor((-top - BEYOND) / rowHeight)) * columns;
    const last = Math.min(found.length, Math.ceil((window.innerHeight - top + BEYOND) / rowHeight) * columns);
    for (const [place, card] of cards) {
      if (place < first || place >= last) {
        card.remove();
        cards.delete(place);
      }
    }
    const made = document.createDocumentFragment();
    for (let place = first; place < last; place++) {
      if (!cards.has(place)) made.append(makeCard(place, pause));
    }
    grid.append(made);
    mark();
  }

  function makeCard(place, pause) {
    const entry = found[place], card = make("div", "", "card");
    card.id = `card-${place}`;
    card.setAttribute("role", "option");
    card.style.width = `${cardWidth}px`;
    card.style.height = `${rowHeight - GAP}px`;
    const x = (place % columns) * (cardWidth + GAP), y = Math.floor(place / columns) * rowHeight;
    card.style.transform = `translate(${x}px, ${y}px)`;
    const picture = make("div", "", "picture");
    picture.style.height = `${rowHeight - GAP - CAPTION}px`;
    const name = make("p", entry.name.replace(/^.*\//, ""), "name");
    name.title = entry.name;
    card.append(picture, name, make("p", described(entry), "note"));
    card.addEventListener("click", () => open(place));
    cards.set(place, card);
    setTimeout(() => { if (cards.get(place) === card) fill(picture, entry); }, pause);
    return card;
  }

  function described(entry) {
    return entry.video ? `video, ${comask.duration(entry.video.seconds)}` : comask.counted(entry.count);
  }

  async function fill(picture, entry) {
    const height = rowHeight - GAP - CAPTION;
    const scale = Math.min(cardWidth / entry.width, height / entry.height);
    const size = [Math.max(1, entry.width * scale), Math.max(1, entry.height * scale)];
    const image = make("img"), canvas = make("canvas");
    image.alt = "";
    for (const one of [image, canvas]) [one.style.width, one.style.height] = size.map((side) => `${side}px`);
    image.src = `${comask.address(entry.number)}.thumb.jpg`;
    picture.append(image, canvas);
    const details = await comask.load(entry.number);
    if (details && picture.isConnected) {
      comask.draw(canvas, ...size, entry, details, comask.instancesOf(entry));
    }
  }

  // ---- Choosing a card ----

  function mark() {
    for (const [place, card] of cards) card.setAttribute("aria-selected", String(place === current));
    if (current >= 0) grid.setAttribute("aria-activedescendant", `card-${current}`);
    else grid.removeAttribute("aria-activedescendant");
  }

  function moveTo(place) {
    if (!found.length) return;
    current = Math.max(0, Math.min(found.length - 1, place));
    const bar = getComputedStyle(form).position === "sticky" ? form.offsetHeight : 0;
    const top = grid.getBoundingClientRect().top + Math.floor(current / columns) * rowHeight;
    if (top < bar + GAP) window.scrollBy(0, top - bar - GAP);
    else if (top + rowHeight > window.innerHeight) window.scrollBy(0, top + rowHeight - window.innerHeight);
    render(0);
  }

  function open(place) {
    current = place;
    mark();
    comask.view.open(found, place, (last) => {
      moveTo(last);
      grid.focus({ preventScroll: true });
    });
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || at("view").open) return;
    if (event.key === "Escape") {
      if (!classList.hidden) toggleClasses(false);
      else if (event.target === at("text")) event.target.blur();
      return;
    }
    if (event.target.closest("input, select, button, summary")) return;
    const rows = Math.max(1, Math.floor(window.innerHeight / rowHeight)) * columns;
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, PageUp: -rows,
      PageDown: rows, Home: -Infinity, End: Infinity };
    if (event.key === "/") at("text").focus();
    else if (event.key === "Enter" && current >= 0) open(current);
    else if (event.key in steps) moveTo(current < 0 ? 0 : current + steps[event.key]);
    else return;
    event.preventDefault();
  });

  // ---- Filters ----

  function refresh() {
    scheduled = false;
    const { found: now, instances, perClass } = comask.chosen();
    found = now;
    current = -1;
    const total = comask.entries.length;
    at("count").textContent = found.length === total ? `${total.toLocaleString()} shown` :
      `${found.length.toLocaleString()} of ${total.toLocaleString()} shown`;
    at("count").textContent += `, ${comask.counted(instances)}`;
    at("score-value").textContent = filter.own ? "own" : filter.score.toFixed(2);
    for (const [label, item] of [...classList.querySelectorAll("li")].entries()) {
      item.querySelector("span.note").textContent = perClass[label].toLocaleString();
    }
    const classes = filter.classes, count = comask.classes.length;
    at("classes").firstElementChild.textContent = !classes ? "all classes"
      : classes.size === 1 ? comask.classes[[...classes][0]] : `${classes.size} of ${count} classes`;
    const bar = getComputedStyle(form).position === "sticky" ? form.offsetHeight : 0;
    const top = grid.getBoundingClientRect().top;
    if (top < bar) window.scrollBy(0, top - bar - GAP); // to the first result
    layOut();
  }

  // Draws once per picture of the screen, however often a slider moves.
  function schedule() {
    if (!scheduled) requestAnimationFrame(refresh);
    scheduled = true;
  }

  // Who chooses a class or a size looks for it.
  function narrow() {
    const all = !filter.classes && !filter.area;
    if (all && filter.which === "with") filter.which = "all";
    if (!all && filter.which === "all") filter.which = "with";
    at("which").value = filter.which;
  }

  function toggleClasses(open) {
    classList.hidden = !open;
    at("classes").firstElementChild.setAttribute("aria-expanded", String(open));
  }

  function chooseClasses(labels) {
    filter.classes = labels.length === comask.classes.length ? null : new Set(labels);
    classList.querySelectorAll("input").forEach((box, label) => { box.checked = labels.includes(label); });
    narrow();
    schedule();
  }

  function listClasses() {
    comask.classes.forEach((name, label) => {
      const item = make("li"), line = make("label"), box = make("input");
      const swatch = make("span", "", "swatch");
      box.type = "checkbox";
      box.checked = true;
      box.addEventListener("change", () => {
        const boxes = [...classList.querySelectorAll("input")];
        chooseClasses(boxes.flatMap((one, place) => (one.checked ? [place] : [])));
      });
      swatch.style.background = comask.colors[label];
      line.append(box, swatch, make("bdi", name), make("span", "", "note"));
      item.append(line);
      classList.querySelector("ul").append(item);
    });
    at("classes").firstElementChild.addEventListener("click", () => toggleClasses(classList.hidden));
    at("every-class").addEventListener("click", () => chooseClasses([...comask.classes.keys()]));
    at("no-class").addEventListener("click", () => chooseClasses([]));
    document.addEventListener("pointerdown", (event) => {
      if (!at("classes").contains(event.target)) toggleClasses(false);
    });
  }

  function listenToFilters() {
    const own = at("own").querySelector("input");
    form.addEventListener("submit", (event) => event.preventDefault());
    at("text").addEventListener("input", () => { filter.text = at("text").value; schedule(); });
    at("score").addEventListener("input", () => {
      filter.score = at("score").valueAsNumber;
      filter.own = own.checked = false;
      schedule();
    });
    own.addEventListener("change", () => { filter.own = own.checked; schedule(); });
    for (const name of ["area", "which", "sort"]) {
      at(name).addEventListener("change", () => {
        filter[name] = at(name).value;
        if (name === "area") narrow();
        schedule();
      });
    }
    filter.own = own.checked = comask.usesOwnThresholds();
    at("own").hidden = !filter.own;
    filter.score = filter.own ? 0.5 : comask.thresholds;
    at("score").value = filter.score; // the slider may round it
  }

  // ---- What stands above ----

  function tell() {
    const facts = Object.entries(comask.facts).map(([name, text]) => `${name} ${text}`);
    at("facts").textContent = facts.join(" · ");
    at("early").hidden = comask.whole;
    const failures = comask.failures;
    if (!failures.length) return;
    const box = at("failures"), list = box.querySelector("ul");
    box.hidden = false;
    box.querySelector("summary").textContent =
      failures.length === 1 ? "1 input failed" : `${failures.length.toLocaleString()} inputs failed`;
    box.addEventListener("toggle", () => { // thousands of lines only for whom wants to read them
      if (!list.children.length) list.append(...failures.map(({ error }) => make("li", error)));
    });
  }

  tell();
  listClasses();
  listenToFilters();
  refresh();
  window.addEventListener("scroll", () => render(PAUSE), { passive: true });
  let width = grid.clientWidth;
  new ResizeObserver(() => {
    if (grid.clientWidth === width) {
      render(0);
      return;
    }
    width = grid.clientWidth;
    const first = Math.floor(Math.max(0, -grid.getBoundingClientRect().top) / rowHeight) * columns;
    layOut();
    const top = grid.getBoundingClientRect().top + Math.floor(first / columns) * rowHeight;
    if (first) window.scrollBy(0, top);
  }).observe(document.body);
})();
