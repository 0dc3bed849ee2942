// uPlot formats the numbers of axes in navigator.language: in other languages than the rest of the page, and not at all
// where it is no language tag (en-US@posix, in the C locale of Linux).
Object.defineProperty(navigator, "language", { value: "en", configurable: true });
