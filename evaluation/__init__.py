"""Score models on lm-eval benchmarks and decide, pairwise, whether a candidate may replace a reference.

benchmarks/  what is asked: shipped, fetched from the Hub, or a YAML of one's own
answers/     how a model answers it, in processes of their own that a kill does not set back
grading/     whether an answer is right
verdict/     what scores show: the report of one model, the gate between two

problems, prompts and grading are named in the YAML of benchmarks, by their users too.
"""
