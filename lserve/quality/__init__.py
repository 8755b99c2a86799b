"""What sparse attention and low-bit pages cost in quality: tasks, askers, scores and paired statistics.

    source = load_text(paths)                                   # text.py: the user's files, or text that is here
    asker = EngineAsker("dense", engine, AttentionOptions(dense=True))     # engine_asker.py: an engine in this process
    asker = HttpAsker("sparse", url, {"token_budget": 1024})    # http_asker.py: a running endpoint
    document = build_document("needles-3", 7500, plans, 10, source, (3, 10), asker)    # tasks.py
    asker.prime(document)                                       # the document alone, into the prefix cache
    replies = asker.ask(document, document.cases)               # asker.py: one Reply a case, with its times
    scores = [score(case, reply.text) for case, reply in zip(document.cases, replies)]    # cases.py: 0 to 1
    share(scores)                                               # statistics.py: mean and 95 % interval
    paired_difference(differences, clusters)                    # the same for dense - sparse, clustered by document

A `Document` is a text and its `Case`s; a case is a question (always asked after the whole text, so that all cases of a
document share it as a prefix), the answers that the reply must contain, its task and its depth. A task is a `Plan`:
(draw, passage, number of questions) to what is planted where and what is asked. `suite.py` runs documents x askers and
can be interrupted; `likelihood.py` scores text that is there already, with an engine in this process.
"""
