"""A pilot: a small experiment that says whether selecting pays for a planned run, and what speaks against it.

Where it is used: by `mates-hf pilot`, and from Python as `mates_hf.pilot.run.run_pilot`, which is the module to read
first. It calls the whole flow as a user would, so it stands right of all folders, and none of them knows of it.

One module a question: `settings` what is asked, `place` where it lies, `inputs` what is trained on, `filters` what is
the rival, `training` how one arm is run, `estimates` how sure a figure is, `summary` what came out, `verdict` what
follows, `page` how a person reads it.
"""
