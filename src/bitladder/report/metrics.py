"""What each figure means, in two sentences."""

METRICS = {
    "PPL": (
        "Perplexity: the exponential of the mean negative log-likelihood of a token of the text. Lower is better, but "
        "only models with the same tokens can be compared, and only on the same text."
    ),
    "ρPPL": (
        "The correlation, over tokens, of the log-likelihoods under the quant and under the full precision. 100 % "
        "means that both find the same tokens hard and easy."
    ),
    "KLD": (
        "Kullback-Leibler divergence: how far the quant's distribution of the next token is from the full precision's, "
        "in nats, averaged over tokens. It is 0 for an exact copy, and every change of a prediction adds to it, so it "
        "tells quants apart best."
    ),
    "RMS Δp": (
        "The root of the mean squared change of the probability given to the token that really follows. It tells by "
        "how many percentage points such a probability typically moves."
    ),
    "Same top token": (
        "The share of places at which quant and full precision find the same token likeliest. Greedy decoding would "
        "take another token at the rest."
    ),
}

BENCHMARKS = {
    "arc": (
        "Science questions from school exams with mostly four answers (AI2 ARC). It asks for facts and some reasoning."
    ),
    "hellaswag": (
        "Which of four endings continues a description of everyday events (HellaSwag). Wrong endings were written by "
        "models and sound right, so that it takes common sense to tell."
    ),
    "mmlu": (
        "Exam questions with four answers from 57 subjects, from school to profession (MMLU). It asks for knowledge "
        "more than for reasoning."
    ),
    "truthfulqa": (
        "Questions that many people answer wrongly, with several answers to choose from (TruthfulQA, one right). A "
        "model that repeats what it read often falls below guessing."
    ),
    "winogrande": (
        "Which of two names fills the blank of a sentence (WinoGrande). Grammar does not tell, the meaning does."
    ),
    "continuation": (
        "Which of four passages follows a passage of the text. It needs no data set, and says little of a model beyond "
        "its own quants."
    ),
}

SPEED = (
    "Tokens per second, higher is faster: pp reads a prompt of so many tokens, tg generates so many, pp+tg does one "
    "after the other. They hold for the machine they were measured on."
)
