"""What is refused before any compute is rented: `common` for every job, one file per trainer family, and `hub` for the Hugging Face Hub.

The types and ranges of single fields do not belong here: the schema checks them.
"""
