"""The MLflow model registry, and what runs on this machine: its servers, and the model it serves.

tracking, runs      MLflow's store and its runs
candidate           a predicted directory that is what its manifest says
registry            its way in: the registered files (artifact), the rows (versions)
champions, audit    the alias champion, and who moved it when
reaper              what a killed process of any of these left
local/              the Prefect and MLflow servers of this machine
serving/            relex serve

compose.yaml, prefect.yaml and the Dockerfile beside these modules are for more machines than this one.
"""
