"""The page's style sheet: system fonts, dark on light, one column on a phone. Nothing is loaded from anywhere."""

CSS = """
:root { --ink: #1a1a1a; --soft: #555; --line: #dcdcdc; --paper: #fff; --wash: #f6f6f4;
        --truth: #009E73; --anchor: #0072B2; --answer: #D55E00; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
body { margin: 0 auto; padding: 2.5rem 1.25rem 5rem; max-width: 72rem; color: var(--ink); background: var(--paper);
       font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; line-height: 1.25; margin: 3.2rem 0 .9rem; padding-top: .9rem;
     border-top: 2px solid var(--ink); }
h3 { font-size: 1.05rem; line-height: 1.35; margin: 0 0 .15rem; overflow-wrap: anywhere; }
h4 { font-size: .82rem; margin: 0 0 .3rem; color: var(--soft); font-weight: 600; }
p { margin: 0 0 .8rem; max-width: 44rem; }
a { color: #005a8e; }
a:focus-visible, summary:focus-visible, .scroll:focus-visible { outline: 3px solid var(--anchor);
outline-offset: 2px; }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin: 1rem 0 0; padding: 0;
         font-size: .92rem; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .84rem; }
pre { background: var(--wash); padding: 1rem; overflow-x: auto; line-height: 1.45; }
.note { color: var(--soft); font-size: .86rem; margin: .5rem 0 0; }
.lead { font-size: 1.08rem; }
.remark { border-left: 3px solid var(--answer); padding-left: .8rem; margin: 1rem 0 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 1rem 2rem;
           margin: 1.6rem 0 0; }
.figures div { border-left: 3px solid var(--anchor); padding-left: .8rem; }
.figures dt { color: var(--soft); font-size: .86rem; }
.figures dd { margin: 0; font-size: 1.45rem; line-height: 1.25; font-weight: 650; font-variant-numeric: tabular-nums;
              }
.figures dd small { display: block; font-size: .82rem; font-weight: 400; color: var(--soft); }

.scroll { overflow-x: auto; margin: 0 0 .4rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0 0 .5rem; }
th, td { padding: .5rem .7rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line);
         white-space: nowrap; }
thead th { vertical-align: bottom; color: var(--soft); font-weight: 600; font-size: .82rem; line-height: 1.25;
           border-bottom: 1.5px solid var(--ink); white-space: normal; min-width: 4.2rem; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); min-width: 4.6rem;
                 padding-left: 0; }
tbody th { font-weight: 600; }
.ci { display: block; color: var(--soft); font-size: .76rem; }
.small { width: auto; min-width: min(100%, 36rem); }
.share { display: inline-block; vertical-align: middle; width: 6rem; height: .55rem; margin-right: .7rem;
         background: #ececea; }
.share + b { display: inline-block; min-width: 4.2rem; font-weight: 400; }
.share span { display: block; height: 100%; background: var(--anchor); }
.side { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem 3rem; }
.note + .scroll { margin-top: 1.8rem; }
.said .terms { margin: .6rem 0 0; }
.theirs { background: var(--wash); color: var(--soft); font-style: italic; }
th.theirs { font-style: normal; }
.paper { background: var(--wash); padding: 1.1rem 1.2rem .9rem; margin-top: 1.8rem; }
.paper th:first-child { background: var(--wash); }

.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1.6rem 1.6rem;
          }
.panels figure { margin: 0; min-width: 0; }
.panels figcaption { font-weight: 600; font-size: .92rem; margin-bottom: .2rem; }
.panels svg { display: block; width: 100%; height: auto; }

.card { border: 1px solid var(--line); border-radius: 6px; padding: 1.1rem 1.2rem; margin: 0 0 1.2rem; }
.kind { display: inline-block; margin: 0 0 .35rem; padding: .05rem .5rem; border-radius: 3px; background: var(--ink);
        color: #fff;
        font-size: .76rem; font-weight: 600; }
.meta { color: var(--soft); font-size: .88rem; margin: 0 0 .8rem; overflow-wrap: anywhere; }
.strip { margin: 0 0 1.1rem; font-size: .8rem; }
.lane { display: grid; grid-template: "label track numbers" auto / 8rem minmax(0, 1fr) 10.5rem; gap: .1rem .8rem;
        align-items: center; margin: 0 0 .28rem; }
.lane .label { grid-area: label; text-align: right; }
.lane .numbers { grid-area: numbers; color: var(--soft); font-variant-numeric: tabular-nums; }
.lane .frames, .lane .track, .lane .axis, .lane .note { grid-area: track; }
.frames { display: block; width: 100%; height: auto; }
.track { position: relative; height: .95rem; background: #efefed; }
.bar { position: absolute; top: 0; bottom: 0; min-width: 3px; border-radius: 2px; }
.bar.truth { background: var(--truth); } .bar.anchor { background: var(--anchor);
             } .bar.answer { background: var(--answer); }
.axis { position: relative; height: 1.5rem; border-top: 1px solid #999; font-variant-numeric: tabular-nums;
        color: var(--soft); }
.axis span { position: absolute; transform: translateX(-50%); padding-top: .2rem; }
.axis span::before { content: ""; position: absolute; top: 0; left: 50%; height: .25rem; border-left: 1px solid #999;
                     }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); gap: .9rem 1.4rem; }
.text { margin: 0; max-width: none; font-size: .9rem; white-space: pre-wrap; overflow-wrap: anywhere;
        max-height: 16rem; overflow-y: auto; }
mark { color: inherit; border-radius: 2px; padding: .05em .15em; }
mark.anchor { background: #d6eaf6; box-shadow: inset 0 -2px var(--anchor); }
mark.answer { background: #fbe3d3; box-shadow: inset 0 -2px var(--answer); }
.terms { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; margin: 0 0 .8rem; font-size: .88rem;
         font-variant-numeric: tabular-nums; }
.terms div { display: flex; gap: .4rem; } .terms dt { color: var(--soft); } .terms dd { margin: 0; font-weight: 600; }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; list-style: none; margin: 0 0 1rem; padding: 0;
       font-size: .88rem; }
.key i { display: inline-block; width: 1.4rem; height: .7rem; margin-right: .45rem; border-radius: 2px; }
details { margin: 0 0 .8rem; } summary { cursor: pointer; font-weight: 600; margin: 0 0 .7rem; }

@media (max-width: 40rem) {
  body { padding: 1.4rem 1rem 3rem; }
  h1 { font-size: 1.5rem; } h2 { margin-top: 2.4rem; }
  .card { padding: .9rem .85rem; }
  .figures { grid-template-columns: 1fr 1fr; gap: 1rem; } .figures dd { font-size: 1.15rem; }
  .lane { grid-template: "label numbers" auto "track track" auto / minmax(0, 1fr) auto; margin-bottom: .4rem; }
  .lane .label { text-align: left; }
  .lane.seconds { grid-template: "track" auto "label" auto / minmax(0, 1fr); }
  .lane.seconds .label { text-align: center; color: var(--soft); }
  th, td { padding: .45rem .5rem; } .small tbody th { white-space: normal; }
  .share { width: 3.2rem; }
  .text { max-height: 14rem; }
}
@media print { .text { max-height: none; } .card, figure { break-inside: avoid; } nav { display: none; } }
"""
