// The sheet: a list of deeds (strokes, pictures, clearings), so that each can be undone and done again.
const sheet = (() => {
  const canvas = $("canvas"), ink = canvas.getContext("2d"), side = canvas.width;
  // How much of the way to the hand the pen goes: less where it creeps, which steadies it, and all where it flies.
  const follow = (distance) => Math.min(1, 0.4 + distance / 40);
  let deeds = [], undone = [], stroke = null, eraser = false;

  const blank = () => { ink.fillStyle = "#fff"; ink.fillRect(0, 0, side, side); };
  const middle = (a, b) => ({ x: (a.x + b.x) / 2, y: (a.y + b.y) / 2 });

  // The piece of a stroke that its newest point settles: a curve from middle to middle of its points.
  function piece({ points, colour }, i, last) {
    const [a, b, c] = [points[i - 2], points[i - 1], points[i]];
    ink.strokeStyle = ink.fillStyle = colour; ink.lineCap = ink.lineJoin = "round"; ink.lineWidth = c.width;
    ink.beginPath();
    if (!b) { ink.arc(c.x, c.y, c.width / 2, 0, 7); ink.fill(); return; }
    const from = a ? middle(a, b) : b, to = middle(b, c);
    ink.moveTo(from.x, from.y); ink.quadraticCurveTo(b.x, b.y, to.x, to.y);
    if (last) ink.lineTo(c.x, c.y);
    ink.stroke();
  }
  function perform(deed) {
    if (deed.points) deed.points.forEach((_, i) => piece(deed, i, i === deed.points.length - 1));
    else {
      blank();
      if (!deed.picture) return;
      const { width, height } = deed.picture, scale = Math.min(side / width, side / height);
      ink.imageSmoothingQuality = "high";
      ink.drawImage(deed.picture, (side - width * scale) / 2, (side - height * scale) / 2, width * scale, height * scale);
    }
  }
  function redraw() {
    blank();
    deeds.slice(Math.max(0, deeds.findLastIndex((deed) => !deed.points))).forEach(perform);
    changed();
  }
  function changed() {
    const empty = !sheet.drawn();
    $("hint").hidden = !empty;
    $("undo").disabled = !deeds.length; $("redo").disabled = !undone.length; $("clear").disabled = empty;
    canvas.ariaLabel = empty ? "Sketch, empty" : `Sketch, ${deeds.at(-1).points ? "drawn by hand" : "a picture"}`;
    canvas.dispatchEvent(new Event("drawn"));
  }
  function add(deed) { deeds.push(deed); undone = []; }

  // A point in the sheet's own pixels; a pen's pressure widens the line, a mouse or finger draws an even one.
  function at(event) {
    const box = canvas.getBoundingClientRect(), scale = side / box.width;
    const pressed = event.pointerType === "pen" && event.pressure ? 0.35 + 1.3 * event.pressure : 1;
    const width = $("width").valueAsNumber * (stroke.eraser ? 4 : pressed);
    return { x: (event.clientX - box.left) * scale, y: (event.clientY - box.top) * scale, width };
  }
  function reach(point, last = false) {
    const { points } = stroke, before = points.at(-1);
    const share = !before || last ? 1 : follow(Math.hypot(point.x - before.x, point.y - before.y));
    const toward = (name) => before[name] + (point[name] - before[name]) * share;
    const next = before ? { x: toward("x"), y: toward("y"), width: toward("width") } : point;
    if (before && !last && Math.hypot(next.x - before.x, next.y - before.y) < 0.7) return;
    points.push(next);
    piece(stroke, points.length - 1, last);
  }
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button && event.button !== 5 || stroke) return;  // 5 is the other end of a pen
    canvas.setPointerCapture(event.pointerId);
    stroke = { id: event.pointerId, points: [], eraser: eraser || event.button === 5 };
    stroke.colour = stroke.eraser ? "#fff" : "#161412";
    reach(at(event));
  });
  canvas.addEventListener("pointermove", (event) => {
    if (event.pointerId !== stroke?.id) return;
    const seen = event.getCoalescedEvents?.() ?? [];
    for (const one of seen.length ? seen : [event]) reach(at(one));
    if (!stroke.eraser) $("hint").hidden = true;
  });
  function end(event) {
    if (event.pointerId !== stroke?.id) return;
    if (stroke.points.length > 1) reach(at(event), true);
    add(stroke); stroke = null; changed();
  }
  canvas.addEventListener("pointerup", end);
  canvas.addEventListener("pointercancel", end);

  function take(isEraser) {
    eraser = isEraser;
    $("pen").ariaPressed = String(!eraser); $("eraser").ariaPressed = String(eraser);
  }
  function undo() { if (deeds.length) { undone.push(deeds.pop()); redraw(); } }
  function redo() { if (undone.length) { deeds.push(undone.pop()); redraw(); } }
  function clear() { if (sheet.drawn()) { add({}); redraw(); } }
  $("pen").onclick = () => take(false);
  $("eraser").onclick = () => take(true);
  $("undo").onclick = undo;
  $("redo").onclick = redo;
  $("clear").onclick = clear;
  $("save").onclick = () => { $("save").href = canvas.toDataURL("image/png"); };

  document.addEventListener("keydown", (event) => {
    if (event.target.matches("textarea, input[type=text], input[type=number], select") || event.altKey) return;
    const key = event.key.toLowerCase(), held = event.ctrlKey || event.metaKey;
    const deed = held ? { z: event.shiftKey ? redo : undo, y: redo }[key]
      : { b: () => take(false), e: () => take(true) }[key];
    if (deed) { event.preventDefault(); deed(); }
  });

  // A file that was opened, dropped or pasted.
  async function open(file) {
    try {
      add({ picture: await createImageBitmap(file) }); redraw();
    } catch { tell(`${file.name || "This"} is no picture that this browser can read: try a PNG or JPEG.`, true); }
  }
  $("open").onclick = () => $("file").click();
  $("file").onchange = () => { if ($("file").files[0]) open($("file").files[0]); $("file").value = ""; };
  document.addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
    if (file) { event.preventDefault(); open(file); }
  });
  document.addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("over"); });
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("over"); });
  document.addEventListener("drop", (event) => {
    event.preventDefault(); document.body.classList.remove("over");
    if (event.dataTransfer.files[0]) open(event.dataTransfer.files[0]);
    else tell("That is no file. Save the picture, then drop its file.", true);
  });

  blank();
  return {
    canvas,
    drawn: () => deeds.slice(deeds.findLastIndex((deed) => !deed.points && !deed.picture) + 1).some((deed) => !deed.eraser),
    png: () => canvas.toDataURL("image/png").split(",")[1],
    async set(png) {  // base64 of a PNG as `png` gave it, or nothing
      if (png) { const image = picture(png); await image.decode(); add({ picture: image }); redraw(); } else clear();
    },
  };
})();
