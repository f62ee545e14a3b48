"""A load test for any server that speaks OpenAI's chat completions, and for two servers in turn.

**What is measured.** Every request streams. TTFT runs from the moment when the request was due (in an open loop that is its
Poisson arrival, whether or not the generator was late) to the first piece of text; ITL is the time between two pieces of
text, as a client sees it. How many prompt tokens there were and how many of them came out of a cache is what the server
says in its usage; tokens computed are the difference.

**Two loops.** Closed: so many clients, each of which asks again as soon as it has its answer; the load adapts to the
server. Open: sessions begin at random moments at a fixed mean rate, as users come who know nothing of each other; a slow
server gets queues. A session is a conversation: its turns follow one another in both loops.

**The same work for all.** Texts are drawn from a seed, and a text's length in words is chosen by how many tokens a word
has in this server's tokenizer. Answers have a fixed length where the server can ignore the end of a turn. What the arms
then did (prompt tokens, answer tokens, answers shorter than asked) is counted and printed, and said if it differs.

**Arms in turn.** With a peer both servers are asked the same, on the same file with as many threads, cells and parallel
sequences. What comes in pieces of seconds (cold, burst, repeat, stall) is asked of one and then of the other while both
are up, A B B A, and the next is asked when the last is at rest: `turns.py`. Sessions (chat, agent, rag, trace) run on one
server at a time, started afresh, A B A B: `run.py` says why. A ratio is the median over pairs of neighbours, turns or
rounds, with its quartiles, so what else the machine does falls on both. The instruction sets that the two were built for
are compared, because a build for any machine may lack what this one has; then the arithmetic differs, whatever the servers
do. Of servers that were started here the processor time is told too, of their own turns and while the other was asked: on
a machine that does other things it says more than the clock on the wall.

    texts      words by name and seed, as many as make so many tokens
    client     one streamed request, and what a server can do
    workloads  what is asked: conversations, and how large the context must be
    drive      sends the sessions, in a closed or an open loop
    measures   cold, burst, repeat, stall: workloads with a question of their own
    servers    starts rekindle and llama-server, on a leash: they end with us
    figures    from answers to percentiles and ratios
    turns      servers asked in turn while all are up
    run        the arms: which servers are up when
    show       table, JSON; plot: the PNG
"""
