'use strict';
(() => {
const $ = (s, of = document) => of.querySelector(s), $$ = (s, of = document) => [...of.querySelectorAll(s)];
const data = JSON.parse($('#data').textContent);
if (!$('#tiles')) return;
const bytes = s => Uint8Array.from(atob(s), c => c.charCodeAt(0));
const colours = {heat: bytes(data.colours.heat), difference: bytes(data.colours.difference)};
const byIndex = new Map(data.images.map(o => [o.i, o]));
const comparing = data.runs.length > 0;
const state = {only: '', t: '', p: '', v: '', a: 0, b: 1, sort: '-loss', view: 'image', shown: 0};
const page = 60;
let found = [], open = null;

// ---- maps: as cifar_cam.maps.scale_maps and cifar_cam.panels.overlay draw them

function enlarge(map, h, w, H, W) { // bilinear, align_corners=False
  const out = new Float32Array(H*W), at = (n, N, i) => Math.min(n - 1, Math.max(0, (i + .5)*n/N - .5));
  for (let y = 0; y < H; y++) {
    const v = at(h, H, y), y0 = Math.floor(v), y1 = Math.min(h - 1, y0 + 1), fy = v - y0;
    for (let x = 0; x < W; x++) {
      const u = at(w, W, x), x0 = Math.floor(u), x1 = Math.min(w - 1, x0 + 1), fx = u - x0;
      out[y*W + x] = (map[y0*w + x0]*(1 - fx) + map[y0*w + x1]*fx)*(1 - fy) + (map[y1*w + x0]*(1 - fx) + map[y1*w + x1]*fx)*fy;
    }
  }
  return out;
}

function scaled(map) { // to 0 to 1
  const low = map.reduce((a, b) => Math.min(a, b)), high = map.reduce((a, b) => Math.max(a, b));
  return map.map(o => (o - low)/(high - low + 1e-7));
}

function weight(strength) { // the share of a map's colour: none where it is cold, most at its peak
  const t = Math.min(1, Math.max(0, (strength - .1)/.65));
  return .8*t*t*(3 - 2*t);
}

// which of an image's maps a view needs: none, one, or two whose difference is drawn
function mapsOf(o, view) {
  if (comparing) return {image: [], right: [state.a], wrong: [state.b], difference: [state.a, state.b]}[view];
  return {image: [], predicted: [0], actual: [o.t === o.p[0] ? 0 : 1], difference: [0, 1]}[view];
}

const pictures = new Map();
function picture(o) {
  if (!pictures.has(o.i)) {
    const img = new Image();
    pictures.set(o.i, new Promise(done => { img.onload = img.onerror = () => done(img); }));
    img.src = o.src;
  }
  return pictures.get(o.i);
}

async function draw(canvas, o, view, size) {
  canvas.dataset.drawn = '';
  const job = canvas.job = {}, img = await picture(o);
  if (canvas.job !== job) return; // asked for something else meanwhile
  const times = Math.max(1, Math.ceil(size/Math.max(img.width, img.height)));
  const W = canvas.width = img.width*times, H = canvas.height = img.height*times, ctx = canvas.getContext('2d');
  ctx.imageSmoothingEnabled = false;
  ctx.drawImage(img, 0, 0, W, H);
  const which = mapsOf(o, view);
  if (which.some(k => o.blank[k])) mark(ctx, W, H);
  else if (which.length) {
    const [h, w] = data.map_size, maps = which.map(k => scaled(enlarge(bytes(o.maps[k]), h, w, img.height, img.width)));
    const two = maps.length === 2, lut = two ? colours.difference : colours.heat;
    const value = enlarge(two ? maps[0].map((a, i) => a - maps[1][i]) : maps[0], img.height, img.width, H, W);
    const heat = new OffscreenCanvas(W, H), px = new ImageData(W, H);
    value.forEach((v, i) => { const c = 3*Math.round(255*(two ? (v + 1)/2 : v)); px.data.set([lut[c], lut[c + 1], lut[c + 2], 255*weight(Math.abs(v))], 4*i); });
    heat.getContext('2d').putImageData(px, 0, 0);
    if (two) { ctx.globalCompositeOperation = 'saturation'; ctx.fillStyle = '#808080'; ctx.fillRect(0, 0, W, H); ctx.globalCompositeOperation = 'source-over'; }
    ctx.drawImage(heat, 0, 0);
  }
  canvas.dataset.drawn = view;
}

function mark(ctx, W, H) { // a map that says nothing is not drawn
  ctx.font = `${Math.round(H/9)}px system-ui, sans-serif`;
  ctx.textAlign = 'center';
  ctx.fillStyle = 'rgb(0 0 0 / .75)';
  ctx.fillRect(W/4, H*.82, W/2, H/7);
  ctx.fillStyle = '#fff';
  ctx.fillText('no map', W/2, H*.925);
}

// ---- words

const name = c => data.classes[c], percent = (p, n = 0) => p > 0 && 100*p < .5*10**-n ? `< ${10**-n}\u00a0%` : `${(100*p).toFixed(n)}\u00a0%`;
const right = (o, k = 0) => o.p[k] === o.t;
const element = (tag, text, css) => { const e = document.createElement(tag); if (text !== undefined) e.textContent = text; if (css) e.className = css; return e; };

function describe(o) {
  if (comparing) return `Image ${o.i}: ${name(o.t)}; ${data.runs.map((r, k) => `${r} says ${name(o.p[k])}`).join(', ')}`;
  return `Image ${o.i}: ${right(o) ? '' : `${name(o.t)} `}taken for ${name(o.p[0])} with ${percent(o.c[0])}, ${right(o) ? 'right' : 'wrong'}`;
}

function verdict(o) {
  if (o.v === undefined) return '';
  const kind = data.verdicts[o.v], copy = o.copy ? `, a copy of ${o.copy}` : '', other = kind === 'label' ? `, rather ${name(o.suggested)}` : '';
  return `Verdict: ${kind}${other}${copy}; label score ${o.doubt.toFixed(2)}, ambiguity score ${o.spread.toFixed(2)}. `;
}

function caption(o, view) {
  const blank = mapsOf(o, view).some(k => o.blank[k]) ? ' The map says nothing, so the image is shown alone.' : '';
  const rival = right(o) ? `the runner-up ${name(o.rival)}` : `the actual class ${name(o.t)}`;
  const run = k => `what ${data.runs[k]} saw for ${name(o.p[k])}`;
  const text = comparing ? {right: `CAM: ${run(state.a)}.`, wrong: `CAM: ${run(state.b)}.`, difference: `Red: ${run(state.a)}; blue: ${run(state.b)}.`}
    : {predicted: `CAM of the predicted class ${name(o.p[0])}.`, actual: `CAM of the actual class ${name(o.t)}.`,
       difference: `Red speaks for ${name(o.p[0])}, blue for ${rival}.`};
  return (text[view] || 'The image as the network sees it.') + blank;
}

// ---- filters and order

const who = () => comparing ? state.b : 0;
const keys = {i: o => o.i, loss: o => o.loss[who()], confidence: o => o.c[who()], doubt: o => o.doubt, spread: o => o.spread, verdict: o => o.v};
const said = (t, p, v) => (state.t === '' || t === +state.t) && (state.p === '' || p === +state.p) && (state.v === '' || v === +state.v)
  && (state.only === '' || (state.only === 'right') === (t === p));

function fits(o) {
  if (!comparing) return said(o.t, o.p[0], o.v);
  return (state.t === '' || o.t === +state.t) && right(o, state.a) && !right(o, state.b);
}

function total() { // images of the whole test set that the filters stand for
  if (comparing) return data.crossed[state.a][state.b].reduce((n, c, t) => n + (state.t === '' || t === +state.t ? c : 0), 0);
  return data.confusion.reduce((n, [t, p, c, v]) => n + (said(t, p, v) ? c : 0), 0);
}

function update() {
  const sign = state.sort[0] === '-' ? -1 : 1, key = keys[state.sort.slice(1)];
  found = data.images.filter(fits).sort((x, y) => sign*(key(x) - key(y)) || x.i - y.i);
  state.shown = 0;
  $('#tiles').replaceChildren();
  const all = total(), n = found.length.toLocaleString('en');
  $('#count').textContent = `${n} image${found.length === 1 ? '' : 's'}` + (all > found.length ? ` here, of ${all.toLocaleString('en')} in the test set` : '');
  for (const s of $$('[data-filter]')) s.value = state[s.dataset.filter];
  if (!found.length) $('#tiles').append(element('p', all ? 'None of these images is in this file; it holds a choice only.' : 'No image is like that.', 'empty'));
  grow();
  setView(state.view);
}

function tile(o) {
  const b = element('button', undefined, 'tile'), canvas = document.createElement('canvas'), ok = right(o, who());
  b.type = 'button'; b.dataset.i = o.i; b.tabIndex = -1;
  canvas.width = canvas.height = 1;
  const said = element('span', undefined, 'says'), mark = element('span', ok ? '✓ ' : '✗ ', ok ? 'mark-good' : 'mark-bad');
  mark.setAttribute('aria-hidden', 'true');
  said.append(element('span', `Image ${o.i}: ${comparing ? `${data.runs[who()]} says ` : 'taken for '}`, 'hidden'), mark, name(o.p[who()]));
  b.append(canvas, said, element('span', (ok ? '' : `is ${name(o.t)}, `) + percent(o.c[who()]), 'was'));
  draw(canvas, o, state.view, 128);
  return b;
}

function grow(upto = state.shown + page) {
  const added = found.slice(state.shown, upto).map(tile);
  $('#tiles').append(...added);
  if (!state.shown && added.length) added[0].tabIndex = 0;
  state.shown = Math.max(state.shown, Math.min(upto, found.length));
  $('#more').hidden = state.shown >= found.length;
  return added;
}

function setView(view) {
  if (view !== 'image' && !data.map_size) view = 'image';
  const changed = view !== state.view;
  state.view = view;
  for (const b of $$('[data-view]')) { b.setAttribute('aria-pressed', b.dataset.view === view); b.disabled = b.dataset.view !== 'image' && !data.map_size; }
  const scale = $('.scale'), lut = view === 'difference' ? colours.difference : colours.heat;
  scale.hidden = view === 'image';
  [scale.firstChild.textContent, scale.lastChild.textContent] = view === 'difference' ? ['−1', '+1'] : ['0', '1'];
  const px = new ImageData(256, 1);
  for (let c = 0; c < 256; c++) px.data.set([lut[3*c], lut[3*c + 1], lut[3*c + 2], 255], 4*c);
  $('canvas', scale).getContext('2d').putImageData(px, 0, 0);
  if (changed) for (const b of $$('.tile')) draw($('canvas', b), byIndex.get(+b.dataset.i), view, 128);
  if (open) show(open);
}

// ---- one image

const viewer = $('#viewer');

function show(o) {
  open = o;
  if (!viewer.open) viewer.showModal();
  const at = found.indexOf(o), ok = right(o, who());
  $('#viewer-title').textContent = ok ? `${name(o.t)}` : `${name(o.t)}, taken for ${name(o.p[who()])}`;
  $('#place').textContent = `${(at + 1).toLocaleString('en')} of ${found.length.toLocaleString('en')}`;
  for (const [b, end] of [[$('#previous'), at <= 0], [$('#next'), at >= found.length - 1]]) {
    if (end && document.activeElement === b) $('#viewer-title').focus(); // switched off, it would lose the keys too
    b.disabled = end;
  }
  $('#caption').textContent = caption(o, state.view);
  $('#picture').setAttribute('aria-label', `${describe(o)}. ${caption(o, state.view)}`);
  $('#about').textContent = verdict(o) + `Image ${o.i}, ${o.file}; ` + (comparing ? data.runs.map((r, k) => `loss ${o.loss[k].toFixed(2)} (${r})`).join(', ')
    : `loss ${o.loss[0].toFixed(2)}, probability of the actual class ${percent(o.actual, 1)}`);
  const rows = comparing ? data.runs.map((r, k) => [`${r}: ${name(o.p[k])}`, o.c[k], right(o, k)]) : o.top.map(([c, p]) => [name(c), p, c === o.t]);
  $('#odds-caption').textContent = comparing ? 'What each run says, and how sure it is' : 'Most probable classes';
  $('#odds').replaceChildren(...rows.map(([text, p, good]) => {
    const tr = element('tr'), th = element('th', good ? `${text} ` : text), gauge = element('td', undefined, 'gauge'), fill = document.createElement('i');
    if (good) { const m = element('span', '✓', 'mark-good'); m.title = 'the actual class'; th.append(m); }
    th.scope = 'row'; th.style.fontWeight = '400'; fill.style.width = `${100*p}%`;
    gauge.append(fill);
    tr.append(th, gauge, element('td', percent(p, 1), 'num'));
    return tr;
  }));
  const hash = `#image-${o.i}` + (state.view === 'image' ? '' : `-${state.view}`);
  $('#link').setAttribute('href', hash);
  history.replaceState(null, '', hash);
  draw($('#picture'), o, state.view, 384);
}

function step(by) {
  const at = found.indexOf(open) + by;
  if (at >= 0 && at < found.length) show(found[at]);
}

viewer.addEventListener('close', () => {
  if (!open) return; // a link to other images closed it: the address and the focus are that link's
  const at = found.indexOf(open);
  open = null;
  history.replaceState(null, '', '#gallery');
  if (at >= state.shown) grow(Math.ceil((at + 1)/page)*page);
  if (at >= 0) focus($$('.tile')[at]);
});
viewer.addEventListener('click', e => { if (e.target === viewer) viewer.close(); });
$('#close').addEventListener('click', () => viewer.close());
$('#previous').addEventListener('click', () => step(-1));
$('#next').addEventListener('click', () => step(1));
$('#link').addEventListener('click', e => { e.preventDefault(); navigator.clipboard?.writeText(location.href).then(() => { $('#link').textContent = 'Copied'; setTimeout(() => { $('#link').textContent = 'Link to it'; }, 1500); }, () => {}); });

const views = $$('.tools [data-view]').map(b => b.dataset.view);
const plain = e => !(e.ctrlKey || e.altKey || e.metaKey);

viewer.addEventListener('keydown', e => {
  if (!plain(e)) return;
  const to = {ArrowLeft: () => step(-1), ArrowRight: () => step(1), Home: () => show(found[0]), End: () => show(found.at(-1))}[e.key];
  if (to) { e.preventDefault(); to(); }
  else if (views[e.key - 1]) setView(views[e.key - 1]);
});

// ---- the tiles: one of them is in the tab order, the arrows move within

function focus(b) {
  for (const t of $$('.tile[tabindex="0"]')) t.tabIndex = -1;
  b.tabIndex = 0;
  b.focus();
}

$('#tiles').addEventListener('keydown', e => {
  const tiles = $$('.tile'), at = tiles.indexOf(e.target.closest('.tile'));
  if (at < 0 || !plain(e)) return;
  const across = tiles.filter(t => t.offsetTop === tiles[0].offsetTop).length;
  const to = {ArrowLeft: at - 1, ArrowRight: at + 1, ArrowUp: at - across, ArrowDown: at + across, Home: 0, End: tiles.length - 1}[e.key];
  if (to !== undefined) { e.preventDefault(); if (tiles[to]) focus(tiles[to]); }
  else if (views[e.key - 1]) setView(views[e.key - 1]);
});
$('#tiles').addEventListener('click', e => { const b = e.target.closest('.tile'); if (b) show(byIndex.get(+b.dataset.i)); });
$('#more').addEventListener('click', () => { const [first] = grow(); if (first) focus(first); });
for (const b of $$('[data-view]')) b.addEventListener('click', () => setView(b.dataset.view));
for (const s of $$('[data-filter]')) s.addEventListener('change', () => {
  const k = s.dataset.filter;
  if (k === 'a' || k === 'b') { // the same run cannot be right and wrong: the two change places
    const other = k === 'a' ? 'b' : 'a', was = state[k];
    state[k] = +s.value;
    if (state[other] === state[k]) state[other] = was;
  } else state[k] = s.value;
  history.replaceState(null, '', '#gallery');
  update();
});

// ---- links: #image-12, #image-12-difference, #true-3-predicted-5, #verdict-0

function follow() {
  let m = location.hash.match(/^#image-(\d+)(?:-([a-z]+))?$/);
  if (m) {
    const o = byIndex.get(+m[1]);
    if (!o) {
      $('#count').textContent = `Image ${m[1]} is not in this file.`;
      $('#gallery').scrollIntoView();
      return;
    }
    if (m[2] && views.includes(m[2])) setView(m[2]);
    if (!found.includes(o)) {
      Object.assign(state, {only: '', t: '', p: '', v: ''});
      if (comparing) { state.a = o.p.findIndex(p => p === o.t); state.b = o.p.findIndex(p => p !== o.t); }
      update();
    }
    show(o);
    return;
  }
  if (comparing) return;
  if (m = location.hash.match(/^#true-(\d+)-predicted-(\d+)$/)) Object.assign(state, {only: '', t: m[1], p: m[2], v: ''});
  else if (m = location.hash.match(/^#verdict-(\d+)$/)) Object.assign(state, {only: 'wrong', t: '', p: '', v: m[1]});
  else return;
  open = null;
  viewer.close();
  update();
  $('#gallery').scrollIntoView();
  (($('.tile')) || $('#gallery select')).focus({preventScroll: true});
}
addEventListener('hashchange', follow);
for (const a of $$('a[href^="#true-"], a[href^="#verdict-"]')) a.addEventListener('click', e => { // the same link twice is no change of the address
  e.preventDefault();
  history.pushState(null, '', a.getAttribute('href'));
  follow();
});

// ---- small pictures beside the most confused pairs

for (const e of $$('.thumbs')) {
  const some = data.images.filter(o => o.t === +e.dataset.true && o.p[0] === +e.dataset.predicted).slice(0, 3);
  e.append(...some.map(o => { const c = document.createElement('canvas'); draw(c, o, 'image', 64); return c; }));
}
update();
follow();
})();
