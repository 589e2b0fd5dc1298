"""What the page looks like, and the script that plays a window. System fonts; nothing is loaded from anywhere."""

from tartvg.report.strips import ANCHOR_COLOUR, ANSWER_COLOUR

FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
CODE_FONTS = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

SCRIPT = """
(() => {
  const player = () => document.getElementById('player');
  let stop = null;
  document.addEventListener('click', event => {
    const bar = event.target.closest('[data-start]'), video = player();
    if (!bar || !video) return;
    stop = Number(bar.dataset.end);
    video.currentTime = Number(bar.dataset.start);
    video.play().catch(() => {});
  });
  const follow = () => {
    const video = player(), head = document.querySelector('.playhead');
    if (video && head) {
      const length = Number(head.parentElement.dataset.duration);
      head.style.left = 100 * Math.min(video.currentTime / length, 1) + '%';
      if (stop !== null && !video.paused && video.currentTime >= stop) { video.pause(); stop = null; }
    }
    requestAnimationFrame(follow);
  };
  requestAnimationFrame(follow);
  // media events do not bubble
  document.addEventListener('error', event => {
    if (event.target === player()) event.target.parentElement.querySelector('.unplayable').hidden = false;
  }, true);
})();
"""

COLOURS = f":root {{ --anchor: {ANCHOR_COLOUR}; --answer: {ANSWER_COLOUR}; }}\n"
CSS = (
    COLOURS
    + """
.gradio-container { width: 100%; max-width: 76rem !important; margin: 0 auto !important;
  padding: clamp(1rem, 3vw, 2.4rem) clamp(.9rem, 4vw, 2rem) 4rem !important; }
.gradio-container .fillable, .gradio-container main, .gradio-container .html-container { padding: 0 !important; }
.question { align-items: center; gap: .6rem !important; }
.question button, .question textarea, .question input { height: 2.6rem; }
.answers { gap: 1.8rem !important; }
.gradio-container h1 { font-size: clamp(1.35rem, 5vw, 1.7rem); line-height: 1.2; margin: 0 0 .25rem;
  letter-spacing: -.01em; font-weight: 700; }
.gradio-container .lead { margin: 0 0 .4rem; color: var(--body-text-color-subdued); }
.picture, .picture .column { gap: .6rem !important; }

.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); gap: .6rem; }
.examples button { display: grid; grid-template-columns: 3rem 1fr; gap: .6rem; margin: 0; padding: .3rem;
  align-items: center; text-align: left; font-size: .82rem; line-height: 1.3; font-weight: 400;
  border: 1px solid var(--border-color-primary); border-radius: 6px; background: var(--background-fill-primary);
  color: var(--body-text-color); cursor: pointer; }
.examples button:hover { border-color: var(--anchor); }
.examples .thumb { width: 3rem; height: 3rem; border-radius: 3px; background-size: cover; background-position: center; }

.stage { background: var(--background-fill-secondary); border-radius: 6px; overflow: hidden; }
.stage video { display: block; width: 100%; height: min(24rem, 62vw); object-fit: contain; }
.stage.empty { height: min(24rem, 62vw); display: grid; place-items: center; text-align: center; }
.stage p { margin: 0; padding: .6rem 1rem; color: var(--body-text-color-subdued); }

.timeline { position: relative; font-variant-numeric: tabular-nums; }
.timeline h3, .said h3 { font-size: .86rem; font-weight: 600; margin: 0 0 .25rem; }
.timeline h3 { position: relative; z-index: 2; width: max-content; max-width: 100%; padding-right: .5rem;
  background: var(--body-background-fill); }
.voice + .voice { margin-top: .6rem; }
.lane { position: relative; height: 1.35rem; margin-bottom: .2rem; background: var(--background-fill-secondary);
  border-radius: 3px; }
.bar { position: absolute; top: 0; bottom: 0; min-width: 4px; border: 0; border-radius: 3px; padding: 0;
  cursor: pointer; }
.bar.anchor { background: var(--anchor); } .bar.answer { background: var(--answer); }
.bar:hover { box-shadow: 0 0 0 2px var(--body-text-color); }
.bar:focus-visible, .examples button:focus-visible { outline: 3px solid var(--body-text-color); outline-offset: 1px; }
.tag { position: absolute; top: 0; line-height: 1.35rem; padding: 0 .5rem; font-size: .78rem; white-space: nowrap;
  pointer-events: none; color: var(--body-text-color); z-index: 2; }
.tag.inside.anchor { color: #fff; background: var(--anchor); }
.tag.inside.answer { color: #000; background: var(--answer); }
.tag.inside { height: 100%; border-radius: 3px; }
.lane.none .tag { left: 0; color: var(--body-text-color-subdued); }
.playhead { position: absolute; top: 0; bottom: 2.3rem; left: 0; width: 0; opacity: .55; pointer-events: none;
  border-left: 1.5px solid var(--body-text-color); z-index: 1; }
.axis { position: relative; height: 1.3rem; border-top: 1px solid var(--body-text-color-subdued); margin-top: .4rem;
  font-size: .76rem; color: var(--body-text-color-subdued); }
.axis span { position: absolute; transform: translateX(-50%); padding-top: .2rem; }
.axis .first { transform: none; } .axis .last { transform: translateX(-100%); }
.unit { margin: 0; text-align: center; font-size: .76rem; line-height: 1; color: var(--body-text-color-subdued); }
.strip { display: block; width: 100%; height: auto; border-radius: 3px; margin: 0; }

.columns { display: grid; gap: 1.6rem; }
.said { border-top: 2px solid var(--body-text-color); padding-top: .5rem; }
.said .text { margin: 0; min-height: 5rem; font-size: .92rem; line-height: 1.65; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.said .writing::after { content: "▍"; color: var(--body-text-color-subdued); }
.said .silent::after { content: "Its reasoning appears here."; color: var(--body-text-color-subdued); }
.said mark { color: inherit; border-radius: 2px; padding: .05em .15em; }
.said mark.anchor { background: color-mix(in srgb, var(--anchor) 18%, transparent);
  box-shadow: inset 0 -2px var(--anchor); }
.said mark.answer { background: color-mix(in srgb, var(--answer) 18%, transparent);
  box-shadow: inset 0 -2px var(--answer); }
.said .form, .said ul { margin: .5rem 0 0; font-size: .86rem; color: var(--body-text-color-subdued); }
.said ul { margin: 0; padding-left: 1.2rem; list-style: disc; }
.said .trouble, .status.refusal { color: var(--error-text-color); }
.said .trouble { margin: .5rem 0 0; font-size: .86rem; }
.status { margin: 0; min-height: 1.5rem; line-height: 1.5rem; font-size: .9rem; color: var(--body-text-color-subdued); }

@media (max-width: 40rem) {
  .examples { grid-template-columns: 1fr 1fr; }
  .question > * { flex: 1 1 100% !important; }
  .lane { height: auto; background: none; padding-top: 1.2rem; }
  .lane::after { content: ""; display: block; height: .8rem; border-radius: 3px;
    background: var(--background-fill-secondary); }
  .bar { top: 1.2rem; height: .8rem; bottom: auto; z-index: 1; }
  .tag { top: 0; left: 0 !important; right: auto !important; padding: 0 .3rem; line-height: 1.2rem; }
  .tag.inside.anchor, .tag.inside.answer { height: auto; color: var(--body-text-color); background: none; }
}
"""
)
