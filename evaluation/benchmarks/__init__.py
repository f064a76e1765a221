"""Benchmarks: what is asked. The YAML files beside these modules are those that relex ships.

benchmark       a name or a path resolved to one lm-eval task with a digest; write_benchmark makes one of problems
catalog         those that can be named
fetch           brings one from the Hub into the data directory, by its recipe
recipe          how a data set of the Hub becomes problems
data_directory  those that were brought, each with its manifest
task_yaml       what defines an lm-eval task, without lm-eval
lm_eval_task    the task, by lm-eval
overlap         whether two benchmarks share problems, by their contents
"""
