"""The charts of tests/bench/growth.py: requests a second, and the slowest in a hundred."""
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

# Okabe and Ito's, for all eyes; black stands in for their yellow, which white swallows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#222222")
MARKERS = "osD^v"
AXES = {"products": "products in the shop", "connections": "client connections",
        "workers": "worker processes"}
GAP = 0.062  # between labels, of the height of a panel


def draw(points, question, note, file):
    """Draw a question's points: a line for each workload, a dashed one for PostgreSQL alone."""
    points = [point for point in points if point["question"] == question]
    workloads = list(dict.fromkeys(point["workload"] for point in points))
    xs = sorted({point["x"] for point in points})
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 4.2), dpi=100, layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    for panel, what, label in zip(panels, ("rps", "p99_ms"), (
            "requests per second", "99th percentile, ms"), strict=True):
        ends = []
        for name, colour, marker in zip(workloads, COLOURS, MARKERS, strict=False):
            for by, style in (("postgresql", "--"), ("shop", "-")):
                line = {point["x"]: point[what] for point in points
                        if point["workload"] == name and point["by"] == by}
                alone = by == "postgresql"
                panel.plot(list(line), list(line.values()), style, color=colour,
                           marker="" if alone else marker, markersize=5,
                           linewidth=1 if alone else 1.8, alpha=0.7 if alone else 1)
            ends.append((line[xs[-1]], name, colour))
        panel.set(xscale="log", yscale="log", xlabel=AXES[question], ylabel=label)
        panel.set_xticks(xs, [f"{x:,}" for x in xs])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.6g}"))
        panel.grid(color="#e4e4e4", linewidth=0.7)
        panel.spines[["top", "right"]].set_visible(False)
        label_ends(panel, ends)
    if any(point["by"] == "postgresql" for point in points):
        note += "; dashed: PostgreSQL alone, the same statements by pgbench"
    figure.suptitle(note, fontsize=9, color="#555555")
    figure.savefig(file)
    pyplot.close(figure)


def label_ends(panel, ends):
    """Name the lines at their right ends, and keep names apart whose ends are close."""
    to_panel = panel.transData + panel.transAxes.inverted()
    ends = sorted(ends)
    heights = [to_panel.transform((1, value))[1] for value, _, _ in ends]
    up, down = heights[:], heights[:]
    for i in range(1, len(ends)):
        up[i] = max(up[i], up[i - 1] + GAP)
        down[-i - 1] = min(down[-i - 1], down[-i] - GAP)
    for low, high, (_, name, colour) in zip(down, up, ends, strict=True):
        panel.text(1.03, (low + high) / 2, name, transform=panel.transAxes, color=colour,
                   fontsize=9, va="center")
