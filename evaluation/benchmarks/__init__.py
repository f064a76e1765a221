"""Benchmarks: what is asked. The YAML files beside these modules are those that relex ships."""
