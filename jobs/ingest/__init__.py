"""The family that makes datasets: from the files that people have to checked rows, and a report about them.

`formats/` reads files, one module each; `mapping/` recognizes what records mean; `rows/` checks rows; `reports/` looks at what was kept;
`sources/` downloads what lies elsewhere. `pipeline.py` joins them. `__main__.py` runs one ingestion in a process of its own for the
service, `family.py` in an attempt. Trainers do not belong here, nor does anything that decides where a dataset's record goes.
"""
