"""The figure of updates' spectra: what is drawn of each adapter, and that nothing hides it."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from smoa_jax.evaluation.inspection import UpdateSpectrum
from smoa_jax.evaluation.plots import PlottedAdapter, load_pyplot, plot_spectra

NAMES = ("layers.self_attn.q_proj", "layers.self_attn.k_proj", "layers.mlp.up_proj", "lm_head")
SIZE = 40


def test_a_missing_library_is_said_with_what_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        ImportError, match=r"the extra 'plot'; pip install '\.\[plot\]' in the repo"
    ):
        load_pyplot()


def adapter(label, rank, *, names=NAMES, full=False, zero=False, ranks=None):
    """Three layers of each kernel, whose singular values end at ``rank`` unless ``full``."""
    end = SIZE if full else rank
    values = np.where(np.arange(SIZE) < end, 3.0 / (1 + np.arange(SIZE)), 1e-9) * (not zero)
    spectra = [
        UpdateSpectrum(
            name=name,
            layer=n,
            singular_values=values * (n + 1),
            rank=end * (not zero),
            relative_norm=0.1,
        )
        for name in names
        for n in range(3)
    ]
    return PlottedAdapter(label=label, spectra=spectra, ranks=ranks or dict.fromkeys(names, rank))


SMOA = adapter("SMoA, spectral blocks", 8, full=True)
LORA = adapter("LoRA", 4)


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """Draws adapters and gives the figure, laid out, before it is closed."""
    plt = load_pyplot()
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)

    def drawn(*adapters):
        path = tmp_path / "plot.png"
        plot_spectra(adapters, path)
        assert path.read_bytes().startswith(b"\x89PNG")
        return figures[-1]

    yield drawn
    monkeypatch.undo()
    for figure in figures:
        plt.close(figure)


def panels(figure):
    """By title; colour bars have none."""
    return {axis.get_title(): axis for axis in figure.axes if axis.get_title()}


def marks(axis):
    """Where vertical lines stand."""
    return [line.get_xdata()[0] for line in axis.lines if len(line.get_xdata()) == 2]


def curves(axis):
    return [line for line in axis.lines if len(line.get_xdata()) > 2]


def test_each_kernel_has_a_panel_with_a_line_for_each_layer_relative_to_its_largest(draw):
    found = panels(draw(SMOA))
    assert sorted(found) == [
        "lm_head, R = 8",
        "mlp.up_proj, R = 8",
        "self_attn.k_proj, R = 8",
        "self_attn.q_proj, R = 8",
    ]
    for axis in found.values():
        assert len(curves(axis)) == 3
        for line in curves(axis):
            assert line.get_ydata()[0] == 1
            assert list(line.get_xdata()) == list(range(1, SIZE + 1))
        assert len({line.get_color() for line in curves(axis)}) == 3


def test_the_rank_is_marked_in_each_panel_as_it_is_there(draw):
    ranks = dict.fromkeys(NAMES, 8) | {"layers.mlp.up_proj": 16}
    found = panels(draw(adapter("SMoA", 8, full=True, ranks=ranks)))
    assert marks(found["self_attn.q_proj, R = 8"]) == [8]
    assert marks(found["mlp.up_proj, R = 16"]) == [16]


def test_two_adapters_differ_in_line_style_and_colour_and_have_their_names_in_the_legend(draw):
    figure = draw(SMOA, LORA)
    axis = panels(figure)["self_attn.q_proj, R = 8 and 4"]
    assert marks(axis) == [8, 4]
    styles = [line.get_linestyle() for line in curves(axis)]
    assert styles == ["-"] * 3 + ["--"] * 3
    assert len({line.get_color() for line in curves(axis)}) == 6
    (legend,) = figure.legends
    words = [text.get_text() for text in legend.get_texts()]
    assert words[:2] == ["SMoA, spectral blocks", "LoRA"]


def test_a_kernel_of_one_adapter_alone_has_its_panel_still(draw):
    few = adapter("LoRA", 4, names=NAMES[:1])
    found = panels(draw(SMOA, few))
    assert len(curves(found["self_attn.q_proj, R = 8 and 4"])) == 6
    assert len(curves(found["lm_head, R = 8"])) == 3


@pytest.mark.parametrize("names", [NAMES, NAMES[:2], NAMES[:1]])
def test_the_legend_lies_within_the_figure_and_covers_no_panel(draw, names):
    label = "SMoA, spectral blocks (arXiv 2605.21147)"
    figure = draw(adapter(label, 8, names=names, full=True), adapter("LoRA", 4, names=names))
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
    for axis in figure.axes:
        if axis.get_visible():
            assert not box.overlaps(axis.get_tightbbox())


def test_an_untrained_adapter_has_no_picture(tmp_path):
    for adapters in ([adapter("LoRA", 4, zero=True)], [SMOA, adapter("LoRA", 4, zero=True)]):
        with pytest.raises(ValueError, match=r"updates are all zero \(LoRA\)"):
            plot_spectra(adapters, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
