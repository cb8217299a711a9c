// The view of one image or video of a page of results: full size, its instances, a video's timeline.
"use strict";

// Returns seconds as 0:07 or 1:02:07.
comask.duration = (seconds) => {
  const whole = Math.floor(seconds), two = (number) => String(number).padStart(2, "0");
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60];
  return hours ? `${hours}:${two(minutes)}:${two(whole % 60)}` : `${minutes}:${two(whole % 60)}`;
};

// Returns `1 instance` or `1,234 instances`.
comask.counted = (count) => `${count.toLocaleString()} ${count === 1 ? "instance" : "instances"}`;

comask.view = (() => {
  const MOST_ZOOM = 8; // of small images
  const STEPS = 100; // of scores in a timeline

  const at = (id) => document.getElementById(id), { make } = comask;
  const dialog = at("view"), stage = at("stage"), body = dialog.querySelector("tbody");
  const note = at("view-note"), bars = at("timeline"), tick = bars.querySelector("p");
  let list = [], place = 0, entry = null, closed = () => {};
  let details = null, instances = [], over = null, masks = true, actual = false;
  let image = null, canvas = null, video = null;

  // ---- Opening ----

  async function show(now) {
    place = Math.max(0, Math.min(list.length - 1, now));
    entry = list[place];
    [details, instances, over, image, canvas, video] = [null, comask.instancesOf(entry), null, null, null, null];
    at("view-name").textContent = entry.name;
    at("view-place").textContent = `${(place + 1).toLocaleString()} of ${list.length.toLocaleString()}, ` +
      `${entry.width} × ${entry.height} pixels`;
    at("previous").disabled = place === 0;
    at("next").disabled = place === list.length - 1;
    bars.hidden = !entry.video;
    at("masks").hidden = at("zoom").hidden = Boolean(entry.video?.overlay);
    tick.textContent = "";
    stage.className = entry.video?.overlay ? "film" : "";
    if (entry.video?.overlay) showVideo();
    else showPicture();
    if (entry.video) body.replaceChildren();
    else listInstances();
    fit();
    const shown = entry, loaded = await comask.load(entry.number);
    if (shown !== entry || !dialog.open) return;
    details = loaded;
    if (!details) note.textContent = "The boxes and masks of this image are missing from the page's folder.";
    else if (entry.video) listClasses();
    else listInstances();
    fit();
    if (place + 1 < list.length) new Image().src = `${comask.address(list[place + 1].number)}.view.jpg`;
  }

  function showPicture() {
    [image, canvas] = [make("img"), make("canvas")];
    image.alt = entry.name;
    image.src = `${comask.address(entry.number)}.view.jpg`;
    canvas.addEventListener("pointermove", (event) => point(instanceAt(event)));
    canvas.addEventListener("pointerleave", () => point(null));
    stage.replaceChildren(image, canvas);
  }

  function showVideo() {
    video = make("video");
    [video.controls, video.preload, video.src] = [true, "metadata", entry.video.overlay];
    video.addEventListener("timeupdate", () => drawTimeline());
    const link = make("a", "the overlay as a file");
    link.href = entry.video.overlay;
    const line = make("p", "", "note");
    line.append(link);
    stage.replaceChildren(video, line);
    video.addEventListener("error", () => line.prepend("This browser cannot play the overlay here: "));
  }

  // Sizes the picture to the window, or to its own pixels, and draws the masks.
  function fit() {
    drawTimeline();
    if (!image) return;
    const [width, height] = details ? details.size : [entry.width, entry.height];
    const box = stage.parentElement, room = bars.hidden ? 0 : bars.offsetHeight;
    const zoom = Math.min(box.clientWidth / width, Math.max(120, box.clientHeight - room) / height, MOST_ZOOM);
    const scale = actual ? 1 : zoom, size = [Math.max(1, width * scale), Math.max(1, height * scale)];
    for (const one of [image, canvas]) [one.style.width, one.style.height] = size.map((side) => `${side}px`);
    stage.style.width = `${size[0]}px`;
    stage.style.height = `${size[1]}px`;
    redraw();
  }

  function redraw() {
    if (!canvas || !details) return;
    const drawn = masks ? instances : over ? [over] : [];
    comask.draw(canvas, canvas.clientWidth, canvas.clientHeight, entry, details, drawn, over);
  }

  // ---- Instances ----

  function listInstances() {
    const total = entry.end - entry.start;
    note.textContent = instances.length === total ? comask.counted(total) :
      `${instances.length} of ${comask.counted(total)} pass the filters`;
    head("class", "score", "area, px", "box, px");
    body.replaceChildren(...instances.map((instance) => {
      const row = named(instance.label), box = details?.boxes[instance.place];
      row.append(make("td", instance.score.toFixed(3)), make("td", instance.area.toLocaleString()),
        make("td", box ? box.map((side) => Math.round(side)).join(", ") : ""));
      row.addEventListener("pointerenter", () => point(instance));
      row.addEventListener("pointerleave", () => point(null));
      return row;
    }));
  }

  function head(...names) {
    const row = make("tr");
    row.append(...names.map((name) => make("th", name)));
    dialog.querySelector("thead").replaceChildren(row);
  }

  // Returns a row that begins with the name of a class.
  function named(label) {
    const row = make("tr"), cell = make("td"), swatch = make("span", "", "swatch");
    swatch.style.background = comask.colors[label];
    cell.append(swatch, make("bdi", comask.classes[label]));
    row.append(cell);
    return row;
  }

  function point(instance) {
    if (instance === over) return;
    over = instance;
    const chosen = instances.indexOf(over);
    [...body.children].forEach((row, number) => row.classList.toggle("over", number === chosen));
    if (chosen >= 0) body.children[chosen].scrollIntoView({ block: "nearest" });
    redraw();
  }

  // Returns the instance under the pointer, of several the one of the highest score.
  function instanceAt(event) {
    if (!details) return null;
    const pen = canvas.getContext("2d");
    const x = (event.offsetX / canvas.clientWidth) * details.size[0];
    const y = (event.offsetY / canvas.clientHeight) * details.size[1];
    pen.setTransform(1, 0, 0, 1, 0, 0); // paths are in pixels of the view
    return instances.find((one) => pen.isPointInPath(comask.pathOf(details, one.place), x, y, "evenodd")) ?? null;
  }

  // ---- Timeline ----

  // Returns for each class that the filters choose: its label and its detections in each part of the time.
  function counted() {
    const { counts, frames } = details.timeline, limits = comask.limits();
    return Object.entries(counts).flatMap(([label, cells]) => {
      const parts = new Float64Array(frames.length);
      let lowest = 0; // step of the scores
      while (lowest <= STEPS && Math.fround(lowest / STEPS) < limits[label]) lowest++;
      for (let i = 0; i < cells.length; i += 3) {
        if (cells[i + 1] >= lowest) parts[cells[i]] += cells[i + 2];
      }
      const total = parts.reduce((sum, count) => sum + count, 0);
      return total ? [{ label: Number(label), parts, total }] : [];
    }).sort((a, b) => b.total - a.total);
  }

  function listClasses() {
    const frames = entry.video.frames;
    details.classes = counted();
    note.textContent = `${frames.toLocaleString()} frames in ${comask.duration(entry.video.seconds)}. ` +
      (entry.video.overlay ? "" : "The picture is the frame of most instances; no overlay was saved. ") +
      "Detections of any size count.";
    head("class", "detections", "per frame");
    body.replaceChildren(...details.classes.map((one) => {
      const row = named(one.label);
      row.append(make("td", one.total.toLocaleString()), make("td", (one.total / frames).toFixed(2)));
      row.addEventListener("pointerenter", () => { over = one; drawTimeline(); });
      row.addEventListener("pointerleave", () => { over = null; drawTimeline(); });
      return row;
    }));
  }

  // Draws each part of the time as a bar: the classes' detections per frame, one upon the other.
  function drawTimeline() {
    if (!details?.classes) return;
    const sheet = bars.querySelector("canvas"), pen = sheet.getContext("2d");
    const { frames, width, start } = details.timeline, dense = Math.min(window.devicePixelRatio || 1, 2);
    sheet.width = Math.max(1, Math.round(sheet.clientWidth * dense));
    sheet.height = Math.max(1, Math.round(sheet.clientHeight * dense));
    const shown = over?.parts ? [over] : details.classes;
    const most = Math.max(1e-9, ...frames.map((count, part) => count && sumAt(details.classes, part) / count));
    const step = sheet.width / frames.length;
    frames.forEach((count, part) => {
      let top = sheet.height;
      for (const { label, parts } of shown) {
        const high = count ? (parts[part] / count / most) * sheet.height : 0;
        pen.fillStyle = comask.colors[label];
        pen.fillRect(part * step, top - high, step > 4 * dense ? step - dense : step + 0.5, high);
        top -= high;
      }
    });
    if (video?.currentTime) {
      pen.fillStyle = getComputedStyle(dialog).color;
      pen.fillRect(((video.currentTime - start) / width) * step - dense / 2, 0, 1.5 * dense, sheet.height);
    }
    if (!tick.textContent) {
      tick.textContent = `Detections per frame from 0:00 to ${comask.duration(entry.video.seconds)}; ` +
        `at most ${most < 1e-6 ? 0 : most.toFixed(1)}.`;
    }
  }

  function sumAt(classes, part) {
    return classes.reduce((sum, one) => sum + one.parts[part], 0);
  }

  function partAt(event) {
    const { frames } = details.timeline, share = event.offsetX / event.target.clientWidth;
    return Math.max(0, Math.min(frames.length - 1, Math.floor(share * frames.length)));
  }

  bars.querySelector("canvas").addEventListener("pointermove", (event) => {
    if (!details?.classes) return;
    const part = partAt(event), { frames, width, start } = details.timeline;
    const from = Math.max(0, start + part * width), to = start + (part + 1) * width;
    const counts = details.classes.filter((one) => one.parts[part])
      .map((one) => `${one.parts[part]} ${comask.classes[one.label]}`);
    tick.textContent = `${from.toFixed(1)}–${to.toFixed(1)} s, ${frames[part]} frames: ` +
      (counts.join(", ") || "nothing");
  });
  bars.querySelector("canvas").addEventListener("click", (event) => {
    const { width, start } = details.timeline;
    if (video) video.currentTime = Math.max(0, start + partAt(event) * width);
  });

  // ---- Keys and buttons ----

  function press(button, on) {
    at(button).setAttribute("aria-pressed", String(on));
  }

  function toggleMasks() {
    masks = !masks;
    press("masks", masks);
    redraw();
  }

  function toggleZoom() {
    actual = !actual;
    press("zoom", actual);
    fit();
  }

  function step(by) {
    if (!instances.length || entry.video) return;
    const now = instances.indexOf(over), next = now < 0 ? (by > 0 ? 0 : instances.length - 1) : now + by;
    point(instances[Math.max(0, Math.min(instances.length - 1, next))]);
  }

  dialog.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target === video) return;
    const actions = { ArrowLeft: () => place > 0 && show(place - 1), m: toggleMasks, z: toggleZoom,
      ArrowRight: () => place < list.length - 1 && show(place + 1),
      ArrowUp: () => step(-1), ArrowDown: () => step(1) };
    if (!(event.key in actions)) return;
    actions[event.key]();
    event.preventDefault();
  });
  at("previous").addEventListener("click", () => show(place - 1));
  at("next").addEventListener("click", () => show(place + 1));
  at("masks").addEventListener("click", toggleMasks);
  at("zoom").addEventListener("click", toggleZoom);
  at("close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => {
    stage.replaceChildren(); // which stops a video
    closed(place);
  });
  new ResizeObserver(() => { if (dialog.open) fit(); }).observe(dialog);

  return {
    // Opens the view at `from` among `entries`; `whenClosed` is called with the place that was shown last.
    open(entries, from, whenClosed) {
      [list, closed] = [entries, whenClosed];
      dialog.showModal();
      dialog.focus();
      show(from);
    },
  };
})();
