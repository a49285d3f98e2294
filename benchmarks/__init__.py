"""The performance suite: ``pytest benchmarks/``, or ``python -m fastconv bench``.

======================  ====================================================================================
``bench_<op>.py``       one operator: its tensors, its definition, what the user would run without fastconv
``harness.py``          contenders of one layer: checked against the definition, then timed in turns
``shapes/<net>.json``   the layers of real networks, by operator
``bench_models.py``     whole networks: ``networks.py`` measures them, against the engines of ``engines.py``
                        too, ``attribution.py`` tells what the time is made of, ``network_report.py`` shows it
``results/<device>/``   the raw JSON of a machine, with versions, commit and the machine's limits
``goals.json``          what each landmark layer should reach
``report.py``           tables and plots from the results
``gpu.py``              everything at once on a machine with a GPU: ``make gpu``
======================  ====================================================================================
"""
