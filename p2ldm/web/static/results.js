// Shows what was drawn, newest first. The value: {title, note, faces: [{url, file, caption, alt}]}, the
// newest set; earlier ones stay on the page.
// Given: element, props (value, kept), trigger, watch.

const find = (name) => element.querySelector(`[data-part="${name}"]`);

function make(tag, className, text = '') {
  const node = document.createElement(tag);
  node.className = className;
  node.textContent = text;
  return node;
}

function card(face) {
  const figure = make('figure', 'p2-face');
  const image = document.createElement('img');
  Object.assign(image, { src: face.url, alt: face.alt });
  const caption = make('figcaption', '', face.caption);
  const vary = make('button', 'p2-button', 'Vary');
  Object.assign(vary, { type: 'button', title: 'Draws others like this one' });
  vary.setAttribute('aria-label', `Vary ${face.caption}`);
  vary.addEventListener('click', () => trigger('select', { url: face.url }));
  const save = make('a', 'p2-button', 'Download');
  Object.assign(save, { href: face.url, download: face.file });
  save.setAttribute('aria-label', `Download ${face.caption}`);
  const actions = make('div', 'p2-actions');
  actions.append(vary, save);
  figure.append(image, caption, actions);
  return figure;
}

function show() {
  if (!props.value || !props.value.faces) return;
  const section = make('section', 'p2-set-of-faces');
  const heading = make('h3', '', props.value.title);
  const note = make('p', 'p2-note', props.value.note);
  const faces = make('div', 'p2-faces');
  faces.append(...props.value.faces.map(card));
  section.append(heading, note, faces);
  find('sets').prepend(section);
  while (find('sets').children.length > props.kept) find('sets').lastChild.remove();
  find('empty').hidden = true;
}

watch('value', show);
show();
