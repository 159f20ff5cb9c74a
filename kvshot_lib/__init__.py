"""The KVShot study: does reusing a target's KV cache keep a speculative drafter accurate over many draft steps?"""

import warnings

# tqdm wants ipywidgets for bars in notebooks; the study's bars are text on purpose (widgets don't survive in saved notebooks).
warnings.filterwarnings("ignore", message="IProgress not found")
