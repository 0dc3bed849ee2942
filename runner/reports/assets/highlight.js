// What is highlighted: the curve, row or line that is pointed at, and those that were clicked, which stay.

const highlight = {
  pointed: null,
  pinned: new Set(),
  listeners: [],

  point(id) {
    if (this.pointed === id) return;
    this.pointed = id;
    this.notify();
  },

  toggle(id) {
    if (!this.pinned.delete(id)) this.pinned.add(id);
    this.notify();
  },

  clear() {
    this.pinned.clear();
    this.pointed = null;
    this.notify();
  },

  has(id) {
    return id !== null && (this.pointed === id || this.pinned.has(id));
  },

  /** Whether anything is highlighted, so that everything else steps back. */
  get isActive() {
    return this.pointed !== null || this.pinned.size > 0;
  },

  onChange(listener) {
    this.listeners.push(listener);
    listener();
  },

  notify() {
    for (const listener of this.listeners) listener();
  },
};
