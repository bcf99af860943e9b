"""Draw selection.png, the picture in README, from the statistics of a run of the text classification recipe.

make demo
python docs/pictures/selection.py runs/text_classification/dion2/seed-0/selection.json
"""

import sys
from pathlib import Path

from dion2_lightning.monitoring.history import SelectionHistory
from dion2_lightning.monitoring.plots import draw

if __name__ == "__main__":
    figure = draw(SelectionHistory.load(sys.argv[1]), "overview")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=100, pil_kwargs={"optimize": True})
