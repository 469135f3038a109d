// Shows how far a request is. The value: {state: idle, waiting, starting, drawing, done or refused; done,
// total: steps; text}.
// Given: element, props (value), watch.

const find = (name) => element.querySelector(`[data-part="${name}"]`);
const TEXTS = {
  waiting: () => 'Waiting for its turn ...',
  starting: () => 'Preparing the model for this kind of request; the first time takes a little longer ...',
  drawing: ({ done, total }) => `Step ${done} of ${total}`,
};

function show() {
  const value = props.value || { state: 'idle' };
  const share = value.total ? Math.round((100 * value.done) / value.total) : 0;
  find('frame').dataset.state = value.state;
  find('bar').style.width = value.state === 'done' ? '100%' : `${share}%`;
  if (value.state === 'drawing' || value.state === 'done') {
    find('track').setAttribute('aria-valuenow', value.state === 'done' ? 100 : share);
  } else {
    find('track').removeAttribute('aria-valuenow');
  }
  const text = value.text || (TEXTS[value.state] ? TEXTS[value.state](value) : '');
  if (find('text').textContent !== text) find('text').textContent = text;
}

watch('value', show);
show();
