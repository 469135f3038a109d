// Paints a mask of class ids, exactly: the canvas only shows what the array holds. The value is a PNG with a
// palette, as a data URL, or '' while nothing is specified.
// Given: element, props (size, classes, flips, examples, photos), server (read_mask, read_photo), watch.

const OPEN = 255; // unspecified
const HISTORY = 60; // strokes that can be undone
const size = props.size;
const find = (name) => element.querySelector(`[data-part="${name}"]`);
const [canvas, ring, status, error] = ['canvas', 'ring', 'status', 'error'].map(find);
const classes = [...props.classes, { id: OPEN, label: 'unspecified', name: '', color: null }];
const mirrored = Uint8Array.from({ length: 256 }, (_, i) => i);
for (const [a, b] of props.flips) [mirrored[a], mirrored[b]] = [b, a];

let ids = new Uint8Array(size * size).fill(OPEN);
let [past, future] = [[], []];
let tool = 'brush';
let current = classes[Math.min(1, classes.length - 2)].id;
let cursor = { x: size / 2, y: size / 2 };
let last = null; // of the stroke that goes on

const label = (id) => classes.find((c) => c.id === id).label;
const paint = () => (tool === 'erase' ? OPEN : current);
const brush = () => Number(find('brush').value);

// ---- what is seen

const context = canvas.getContext('2d');
canvas.width = canvas.height = size;
const shown = context.createImageData(size, size);
const rgba = new Uint8ClampedArray(1024);
for (const { id, color } of props.classes) rgba.set([...color, 255], 4 * id);

function show() {
  for (let i = 0; i < ids.length; i++) {
    for (let c = 0; c < 4; c++) shown.data[4 * i + c] = rgba[4 * ids[i] + c];
  }
  context.putImageData(shown, 0, 0);
}

function describe() {
  const counts = new Map();
  for (const id of ids) counts.set(id, (counts.get(id) || 0) + 1);
  for (const entry of find('palette').children) {
    const share = (100 * (counts.get(Number(entry.dataset.id)) || 0)) / ids.length;
    entry.querySelector('.p2-share').textContent =
      share === 0 ? '' : share < 1 ? '<1%' : `${Math.round(share)}%`;
  }
  const painted = classes.filter((c) => c.id !== OPEN && counts.has(c.id)).map((c) => c.label);
  canvas.setAttribute(
    'aria-label',
    `Mask of ${size} by ${size} pixels: ` + (painted.length ? painted.join(', ') : 'all unspecified')
  );
  find('hint').hidden = painted.length > 0;
  find('undo').disabled = !past.length;
  find('redo').disabled = !future.length;
  find('clear').disabled = find('save').disabled = !painted.length;
  return painted.length > 0;
}

function say(text) {
  status.textContent = text;
}

function complain(text) {
  error.textContent = text;
  error.hidden = !text;
}

function commit(text) {
  show();
  props.value = describe() ? png() : '';
  complain('');
  say(text);
}

// ---- what is painted

function remember() {
  past.push(ids.slice());
  if (past.length > HISTORY) past.shift();
  future = [];
}

function stamp(x, y, id) {
  const radius = brush() / 2;
  const [top, bottom] = [Math.max(0, Math.floor(y - radius)), Math.min(size - 1, Math.ceil(y + radius))];
  const [left, right] = [Math.max(0, Math.floor(x - radius)), Math.min(size - 1, Math.ceil(x + radius))];
  for (let row = top; row <= bottom; row++) {
    for (let column = left; column <= right; column++) {
      const under = row === Math.floor(y) && column === Math.floor(x);
      if (under || Math.hypot(column + 0.5 - x, row + 0.5 - y) <= radius) ids[row * size + column] = id;
    }
  }
}

function both(x, y, act) {
  if (find('mirror').checked) act(size - x, y, mirrored[paint()]);
  act(x, y, paint());
}

function stroke(from, to) {
  const steps = Math.max(1, Math.ceil(2 * Math.hypot(to.x - from.x, to.y - from.y)));
  for (let i = 0; i <= steps; i++) {
    const [x, y] = [from.x + ((to.x - from.x) * i) / steps, from.y + ((to.y - from.y) * i) / steps];
    both(x, y, stamp);
  }
}

function fill(x, y, id) {
  const start = Math.min(size - 1, Math.floor(y)) * size + Math.min(size - 1, Math.floor(x));
  const old = ids[start];
  if (old === id) return;
  const open = [start];
  ids[start] = id;
  while (open.length) {
    const at = open.pop();
    const column = at % size;
    for (const next of [column ? at - 1 : -1, column < size - 1 ? at + 1 : -1, at - size, at + size]) {
      if (next >= 0 && next < ids.length && ids[next] === old) {
        ids[next] = id;
        open.push(next);
      }
    }
  }
}

function begin(at) {
  remember();
  if (tool === 'fill') both(at.x, at.y, fill);
  else stroke(at, at);
  show();
}

const done = () =>
  commit(`${tool === 'fill' ? 'Filled' : 'Painted'}: ${label(paint())}.`);

function step(from, to, text) {
  if (!from.length) return;
  to.push(ids);
  ids = from.pop();
  commit(text);
}

function replace(other, text) {
  remember();
  ids = other;
  commit(text);
}

// ---- pointer and keys

function place(event) {
  const box = canvas.getBoundingClientRect();
  return {
    x: Math.min(size - 0.01, Math.max(0, ((event.clientX - box.left) / box.width) * size)),
    y: Math.min(size - 0.01, Math.max(0, ((event.clientY - box.top) / box.height) * size)),
  };
}

function showRing(at) {
  const diameter = tool === 'fill' ? 1 : brush();
  ring.style.width = ring.style.height = `${(100 * diameter) / size}%`;
  ring.style.left = `${(100 * at.x) / size}%`;
  ring.style.top = `${(100 * at.y) / size}%`;
  ring.hidden = false;
}

canvas.addEventListener('pointerdown', (event) => {
  if (event.button) return;
  event.preventDefault();
  canvas.focus({ preventScroll: true });
  canvas.setPointerCapture(event.pointerId);
  last = cursor = place(event);
  begin(last);
});
canvas.addEventListener('pointermove', (event) => {
  showRing(place(event));
  if (!last) return;
  if (tool !== 'fill') {
    const events = event.getCoalescedEvents ? event.getCoalescedEvents() : [];
    for (const each of events.length ? events : [event]) {
      const at = place(each);
      stroke(last, at);
      last = at;
    }
    show();
  }
  cursor = place(event);
});
for (const name of ['pointerup', 'pointercancel']) {
  canvas.addEventListener(name, () => {
    if (last) done();
    last = null;
  });
}
canvas.addEventListener('pointerleave', () => {
  if (document.activeElement !== canvas) ring.hidden = true;
});
canvas.addEventListener('blur', () => (ring.hidden = true));

const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
canvas.addEventListener('keydown', (event) => {
  const key = event.key;
  const command = event.ctrlKey || event.metaKey;
  if (command && key.toLowerCase() === 'z') {
    event.shiftKey ? step(future, past, 'Redone.') : step(past, future, 'Undone.');
  } else if (command || event.altKey) {
    return;
  } else if (MOVES[key]) {
    const [dx, dy] = MOVES[key].map((d) => d * (event.shiftKey ? Math.max(2, size / 8) : 1));
    const kept = (v) => Math.min(size - 0.5, Math.max(0.5, Math.floor(v) + 0.5));
    cursor = { x: kept(cursor.x + dx), y: kept(cursor.y + dy) };
    showRing(cursor);
    const [x, y] = [Math.floor(cursor.x), Math.floor(cursor.y)];
    say(`x ${x}, y ${y}: ${label(ids[y * size + x])}`);
  } else if (key === ' ' || key === 'Enter') {
    begin(cursor);
    done();
    showRing(cursor);
  } else if (key === '[' || key === ']') {
    find('brush').value = brush() + (key === ']' ? 1 : -1);
    find('brush').dispatchEvent(new Event('input'));
    showRing(cursor);
  } else {
    const chosen = { b: 'brush', f: 'fill', e: 'erase' }[key.toLowerCase()];
    if (!chosen) return;
    choose(chosen);
    say(`Tool: ${chosen}.`);
  }
  event.preventDefault();
});

// ---- controls

function option(group, text, value, checked, onChange) {
  const entry = document.createElement('label');
  const input = document.createElement('input');
  Object.assign(input, { type: 'radio', name: group, value, checked });
  input.addEventListener('change', onChange);
  entry.append(input, text);
  return entry;
}

function choose(name) {
  tool = name;
  for (const input of find('tools').querySelectorAll('input')) input.checked = input.value === name;
}

for (const name of ['brush', 'fill', 'erase']) {
  const text = document.createElement('span');
  text.textContent = name[0].toUpperCase() + name.slice(1);
  find('tools').append(option('p2-tool', text, name, name === tool, () => choose(name)));
}

for (const { id, label: text, name, color } of classes) {
  const inside = document.createElement('span');
  inside.className = 'p2-class';
  const swatch = document.createElement('span');
  swatch.className = 'p2-swatch';
  if (color) swatch.style.background = `rgb(${color})`;
  else swatch.classList.add('p2-open');
  const share = document.createElement('span');
  share.className = 'p2-share';
  const words = document.createElement('span');
  words.className = 'p2-name';
  words.textContent = text;
  inside.append(swatch, words, share);
  const entry = option('p2-class', inside, String(id), id === current, () => {
    current = id;
    if (tool === 'erase') choose('brush');
  });
  entry.dataset.id = id;
  entry.title = name && name !== text ? `${text} (${name}, ${id})` : text;
  find('palette').append(entry);
}

find('brush').max = Math.max(2, Math.round(size / 4));
find('brush').value = Math.max(1, Math.round(size / 12));
find('brush').addEventListener('input', () => {
  find('brush-size').textContent = `${brush()} px`;
});
find('brush').dispatchEvent(new Event('input'));
find('undo').addEventListener('click', () => step(past, future, 'Undone.'));
find('redo').addEventListener('click', () => step(future, past, 'Redone.'));
find('clear').addEventListener('click', () =>
  replace(new Uint8Array(ids.length).fill(OPEN), 'Cleared: all is unspecified.')
);

// ---- files and examples

const fromBase64 = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

function thumbnail(mask) {
  const small = document.createElement('canvas');
  small.width = small.height = size;
  const picture = small.getContext('2d');
  const data = picture.createImageData(size, size);
  mask.forEach((id, i) => data.data.set(rgba.subarray(4 * id, 4 * id + 4), 4 * i));
  picture.putImageData(data, 0, 0);
  return small;
}

props.examples.forEach((text, i) => {
  const mask = fromBase64(text);
  const button = document.createElement('button');
  Object.assign(button, { type: 'button', className: 'p2-example', title: `Example face ${i + 1}` });
  button.setAttribute('aria-label', `Example face ${i + 1}`);
  button.append(thumbnail(mask));
  button.addEventListener('click', () => replace(mask.slice(), `Example ${i + 1} loaded.`));
  find('examples').append(button);
});
find('examples').hidden = !props.examples.length;

function opens(button, input, read, text) {
  find(button).addEventListener('click', () => find(input).click());
  find(input).addEventListener('change', async () => {
    const file = find(input).files[0];
    find(input).value = '';
    if (!file) return;
    if (file.size > props.file_bytes) {
      const most = Math.round(props.file_bytes / 2 ** 20);
      complain(`${file.name} is larger than the ${most} MiB that this page takes. Make it smaller.`);
      return;
    }
    say(`Reading ${file.name} ...`);
    try {
      const answer = await read(await dataUrl(file));
      if (answer.error) throw new Error(answer.error);
      replace(fromBase64(answer.ids), text);
    } catch (problem) {
      say('');
      complain(problem.message || `${file.name} cannot be read.`);
    }
  });
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

opens('open-mask', 'mask-file', (url) => server.read_mask(url), 'Mask loaded.');
opens('open-photo', 'photo-file', (url) => server.read_photo(url), 'Mask of the photograph.');
find('open-photo').hidden = !props.photos;
find('save').addEventListener('click', () => {
  const link = document.createElement('a');
  Object.assign(link, { href: png(), download: 'mask.png' });
  link.click();
});

// ---- PNG: 8-bit palette, stored without compression

const crcs = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n;
});

function chunk(type, data) {
  const bytes = new Uint8Array(12 + data.length);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, data.length);
  for (let i = 0; i < 4; i++) bytes[4 + i] = type.charCodeAt(i);
  bytes.set(data, 8);
  let crc = 0xffffffff;
  for (let i = 4; i < 8 + data.length; i++) crc = crcs[(crc ^ bytes[i]) & 255] ^ (crc >>> 8);
  view.setUint32(8 + data.length, ~crc >>> 0);
  return bytes;
}

function zlib(raw) {
  const blocks = Math.max(1, Math.ceil(raw.length / 65535));
  const out = new Uint8Array(2 + raw.length + 5 * blocks + 4);
  out.set([0x78, 0x01]);
  let [at, a, b] = [2, 1, 0];
  for (let start = 0; start < raw.length; start += 65535) {
    const part = raw.subarray(start, start + 65535);
    const final = start + part.length === raw.length ? 1 : 0;
    const [low, high] = [part.length & 255, part.length >> 8];
    out.set([final, low, high, ~low & 255, ~high & 255], at);
    out.set(part, at + 5);
    at += 5 + part.length;
  }
  for (const byte of raw) {
    a = (a + byte) % 65521;
    b = (b + a) % 65521;
  }
  new DataView(out.buffer).setUint32(at, ((b << 16) | a) >>> 0);
  return out;
}

function png() {
  const header = new Uint8Array(13);
  const view = new DataView(header.buffer);
  view.setUint32(0, size);
  view.setUint32(4, size);
  header.set([8, 3], 8);
  const colors = new Uint8Array(768).fill(128); // the colour of "unspecified"
  for (const { id, color } of props.classes) colors.set(color, 3 * id);
  const raw = new Uint8Array(size * (size + 1));
  for (let y = 0; y < size; y++) raw.set(ids.subarray(y * size, (y + 1) * size), y * (size + 1) + 1);
  const signature = Uint8Array.of(137, 80, 78, 71, 13, 10, 26, 10);
  const parts = [
    signature,
    chunk('IHDR', header),
    chunk('PLTE', colors),
    chunk('IDAT', zlib(raw)),
    chunk('IEND', new Uint8Array(0)),
  ];
  let text = '';
  for (const part of parts) {
    for (let i = 0; i < part.length; i += 8192) {
      text += String.fromCharCode(...part.subarray(i, i + 8192));
    }
  }
  return `data:image/png;base64,${btoa(text)}`;
}

ring.hidden = true;
show();
describe();
