"""What a job would do, need, take and cost, and what the service chooses where a request says "auto".

`facts.py` is what is known of the base and the rows; each family plans in files of its own, with the estimator of `schema/estimate/`.
Nothing here stores, launches or charges anything.
"""
