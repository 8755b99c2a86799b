"""`lserve poc`: what sparse attention brings on the user's own documents, measured in an hour and said in one page.

    documents = read_documents(paths, tell)         # readers.py: files to text, with a line for each that is left out
    questions = read_questions(path, tell)          # questions.py: the user's own questions and answers
    settings = engine_settings(engines, budgets)    # settings.py: full and sparse ones, each an asker and a probe
    findings = Study(...).run()                     # study.py: plans by what it measured, asks, times, traces
    advice = Advice(settings, findings, ...)        # advice.py: costs, gains, losses, one recommendation
    write_report(path, advice, facts)               # report.py: one HTML page that needs no network

It asks and scores with `lserve.quality`; what is timed, counted and recommended is here.
"""
