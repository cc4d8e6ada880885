"""How the page looks: system fonts, nothing fetched from elsewhere."""

from typing import Any

import gradio as gr

SANS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif"]
MONO = ["ui-monospace", "Menlo", "Consolas", "monospace"]

CSS = """
.gradio-container { width: 100% !important; max-width: 1280px !important; margin: 0 auto !important; }
#title h1 { font-size: 1.35rem; font-weight: 650; margin: 0; }
#title p { margin: 2px 0 0; color: var(--body-text-color-subdued); font-size: .9rem; }
h2 { font-size: .95rem; font-weight: 600; margin: 0; }
h2 small { font-size: .85rem; font-weight: 400; color: var(--body-text-color-subdued); }
.html-container { padding: 0 !important; }
.block:has(> .html-container > .prose:empty) { display: none; }
.fields, .buttons, .form { gap: 12px; }
.fields > .form { display: contents; }
.fields { align-items: stretch !important; }
.fields .block > .container { display: flex; flex-direction: column; height: 100%; }
.fields .block > .container > :last-child { margin-top: auto; }
.fields input[type=number], #train-rate input { height: 38px; }
.sliders input[type=number] { height: auto; }
.about { font-size: .8rem; color: var(--body-text-color-subdued); }
.folded { border-width: 0 0 1px !important; border-radius: 0 !important; padding-inline: 0 !important; }
.folded:last-child { border-bottom: 0 !important; }
.fields .block:has(> label > input[type=checkbox], input[type=checkbox]) {
  min-width: min(170px, 100%) !important; }
.sliders:not(:has(input)) { display: none; }
#paint-canvas canvas { background: black; border-radius: 6px; touch-action: none; cursor: crosshair;
  width: min(100%, 300px); aspect-ratio: 1; display: block; margin-bottom: 8px; }
#paint-canvas label { display: inline-flex; gap: 8px; align-items: center; margin-right: 16px; }
#paint-canvas button { font-size: .8rem; font-weight: 400; padding: 4px 12px; border-radius: 4px;
  background: var(--button-secondary-background-fill); text-decoration: none; }
.form > .block, .form { background: transparent; box-shadow: none; border: none !important; }
.form > .block { padding: 0 !important; }
.adapters { align-items: end; gap: 12px; }
input[role=combobox] { text-overflow: ellipsis; padding-right: 26px !important; }
.wrap:has(> .wrap-inner input[role=combobox]) { min-height: 37px; align-content: center; }
.gallery-container .grid-wrap { min-height: 0 !important; }
.gallery-container { padding-top: 24px !important; }
.thumbs .gallery-container { padding-top: 0 !important; }
.gallery-container .grid-container {
  grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)) !important; }
.thumbs .grid-container { grid-template-columns: repeat(auto-fill, minmax(68px, 1fr)) !important;
  grid-auto-rows: min-content !important; }
.thumbs .thumbnail-item { aspect-ratio: 1; height: auto !important; }
.thumbs .caption-label { display: none; }
#train-download .label-clear-button { display: none; }
#train-download .filename { flex-wrap: wrap; }
#train-download .stem { white-space: normal; overflow-wrap: anywhere; }
.idle { padding: 22px 18px; border: 1px dashed var(--border-color-primary); border-radius: 8px;
  color: var(--body-text-color-subdued); text-align: center; }
.job { padding: 12px 16px 14px; border: 1px solid var(--border-color-primary); border-radius: 8px;
  background: var(--block-background-fill); }
.job-line { display: flex; flex-wrap: wrap; justify-content: space-between;
  gap: 4px 14px; margin-bottom: 8px; }
.job-line span { color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; }
.bar { height: 8px; border-radius: 4px; background: var(--border-color-primary); overflow: hidden; }
.bar div { height: 100%; border-radius: 4px; background: var(--color-accent); transition: width .6s linear; }
.job-done .bar div { background: #2f9e62; }
.job-failed .bar div, .job-interrupted .bar div { background: #c9433c; }
.job-cancelled .bar div { background: var(--body-text-color-subdued); }
.notice { padding: 8px 12px; border-radius: 6px; overflow-wrap: anywhere;
  border-left: 4px solid var(--color-accent); background: var(--background-fill-secondary); }
.job .notice { margin-top: 10px; }
.notice.bad { border-left-color: #c9433c; background: color-mix(in srgb, #c9433c 10%, transparent); }
"""


def theme() -> Any:
    """Return the page's theme: flat fields with plain labels."""
    plain = gr.themes.Default(
        primary_hue="indigo", neutral_hue="slate", font=SANS, font_mono=MONO, spacing_size="sm"
    )
    flat: dict[str, Any] = {}
    for dark in ("", "_dark"):
        flat |= {
            f"block_title_background_fill{dark}": "transparent",
            f"block_title_text_color{dark}": "*body_text_color",
            f"block_label_background_fill{dark}": "*background_fill_secondary",
            f"block_label_text_color{dark}": "*body_text_color_subdued",
            f"block_label_border_width{dark}": "0px",
            f"input_border_width{dark}": "1px",
            f"body_background_fill{dark}": "*background_fill_primary",
        }
    return plain.set(**flat, block_title_padding="0", block_title_text_weight="500", block_shadow="none")
