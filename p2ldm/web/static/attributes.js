// Sets each attribute to no, unspecified or yes. The value is {name: -1 or 1} of those that are set.
// Given: element, props (names, value).

const find = (name) => element.querySelector(`[data-part="${name}"]`);
const STATES = [
  [-1, 'no'],
  [0, 'any'],
  [1, 'yes'],
];
let chosen = {};

function row(name, i) {
  const text = name.replaceAll('_', ' ');
  const group = document.createElement('fieldset');
  group.dataset.name = name;
  const legend = document.createElement('legend');
  legend.textContent = text;
  const choices = document.createElement('span');
  choices.className = 'p2-segments';
  for (const [value, word] of STATES) {
    const entry = document.createElement('label');
    entry.dataset.state = word;
    const input = document.createElement('input');
    Object.assign(input, { type: 'radio', name: `p2-attribute-${i}`, value, checked: value === 0 });
    input.setAttribute('aria-label', `${text}: ${value ? word : 'unspecified'}`);
    input.addEventListener('change', () => set(name, value));
    const shown = document.createElement('span');
    shown.textContent = word;
    entry.append(input, shown);
    choices.append(entry);
  }
  group.append(legend, choices);
  return group;
}

function chip(name) {
  const text = (chosen[name] > 0 ? '' : 'no ') + name.replaceAll('_', ' ');
  const button = document.createElement('button');
  Object.assign(button, { type: 'button', className: 'p2-chip', textContent: text });
  button.dataset.state = chosen[name] > 0 ? 'yes' : 'no';
  button.setAttribute('aria-label', `${text}: leave it unspecified`);
  button.addEventListener('click', () => {
    find('rows').querySelector(`[data-name="${CSS.escape(name)}"] input[value="0"]`).checked = true;
    set(name, 0);
    find('search').focus();
  });
  return button;
}

function set(name, value) {
  chosen = { ...chosen };
  if (value) chosen[name] = value;
  else delete chosen[name];
  publish();
}

function publish() {
  const count = Object.keys(chosen).length;
  find('count').textContent = count
    ? `${count} of ${props.names.length} set; the model chooses the others.`
    : 'None set: the model chooses.';
  find('clear').disabled = find('chips').hidden = !count;
  find('chips').replaceChildren(...Object.keys(chosen).map(chip));
  for (const group of find('rows').children) {
    group.classList.toggle('p2-set', group.dataset.name in chosen);
  }
  props.value = chosen;
}

find('rows').append(...props.names.map(row));
find('clear').addEventListener('click', () => {
  chosen = {};
  for (const input of find('rows').querySelectorAll('input')) input.checked = input.value === '0';
  publish();
});
find('search').addEventListener('input', () => {
  const wanted = find('search').value.trim().toLowerCase().replaceAll(' ', '_');
  let any = false;
  for (const group of find('rows').children) {
    group.hidden = !group.dataset.name.toLowerCase().includes(wanted);
    any ||= !group.hidden;
  }
  find('none').hidden = any;
});
publish();
