"""What the bundled model learns: makers of conversations with the one right reply to each.

A reply follows from its prompt alone, so that exact match has one meaning everywhere. One example
in twenty, chosen by a hash of its content, is kept out of training and used to measure. Words of
the lists are not kept out of spelling and of names: such a word is one token, whose letters can
only be learned from the word itself.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import words

ABILITIES = (
    "add two numbers of up to four digits, repeat words, remember what you tell me, spell words, "
    "and use a calculator function"
)
HELLO = f"Hello! I am a small demonstration model. I can {ABILITIES}. Try: What is 1234 + 5678?"
ABOUT = f"I am a small demonstration model served by Headrace. I can {ABILITIES}."
SORRY = f"Sorry, I only know how to {ABILITIES}."
NO_MATH = (
    "Sorry, I can only add two numbers of up to four digits. "
    "Give me a calculator function for more."
)


@dataclass(frozen=True)
class Example:
    """A conversation and the reply that the model shall write."""

    skill: str
    messages: list[dict[str, Any]]
    analysis: str
    final: str = ""
    call: str = ""  # arguments of a call to the calculator, in place of final
    tools: list[dict[str, Any]] = field(default_factory=list)
    reasoning_effort: str = "medium"
    key: str = ""  # what is held out by hash; empty: there is nothing to memorise
    letterwise: bool = False  # write the final answer one letter a token

    @property
    def held_out(self) -> bool:
        """Whether this example is for measuring only."""
        return bool(self.key) and zlib.crc32(self.key.encode()) % 20 == 0


def user(content: str) -> dict[str, Any]:
    """A message of the user."""
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    """A final answer of the model."""
    return {"role": "assistant", "content": content}


def effort(rng: random.Random) -> str:
    """A reasoning effort, mostly the default."""
    return rng.choice(("low", "medium", "medium", "high"))


def number(rng: random.Random) -> int:
    """A number of one to four digits, each length equally often."""
    digits = rng.randint(1, 4)
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


SUM_FORMS = (
    "What is {a} + {b}?", "What is {a} plus {b}?", "{a} + {b}", "{a}+{b}", "{a} + {b} =",
    "{a}+{b}=?", "{a} + {b} = ?", "Add {a} and {b}.", "Add {a} to {b}.", "add {a} and {b}",
    "Calculate {a} + {b}.", "Compute {a} + {b}", "Please add {a} and {b}.", "what is {a} + {b}",
    "What is the sum of {a} and {b}?", "How much is {a} + {b}?", "How much is {a} plus {b}?",
    "Can you add {a} and {b}?", "I have {a} apples and get {b} more. How many do I have?",
    "What's {a} + {b}?", "What is {a}+{b}?", "Sum of {a} and {b}", "{a} plus {b}",
)  # fmt: skip
DIFFERENCE_FORMS = (
    "What is {a} - {b}?", "What is {a} minus {b}?", "{a} - {b}", "{a}-{b}", "{a} - {b} =",
    "{a}-{b}=?", "{a} - {b} = ?", "Subtract {b} from {a}.", "Take {b} away from {a}.",
    "Calculate {a} - {b}.", "Compute {a} - {b}", "Please subtract {b} from {a}.",
    "What is the difference between {a} and {b}?", "How much is {a} - {b}?", "{a} minus {b}",
    "How much is {a} minus {b}?", "What's {a} - {b}?", "What is {a}-{b}?", "what is {a} - {b}",
)  # fmt: skip
PRODUCT_FORMS = (
    "What is {a} * {b}?", "What is {a} times {b}?", "{a} * {b}", "{a}*{b}", "Multiply {a} by {b}.",
    "Calculate {a} * {b}.", "How much is {a} * {b}?", "What's {a} * {b}?", "{a} times {b}",
)  # fmt: skip
QUOTIENT_FORMS = (
    "What is {a} / {b}?", "What is {a} divided by {b}?", "{a} / {b}", "Divide {a} by {b}.",
    "Compute {a} / {b}", "How much is {a} / {b}?", "Calculate {a} / {b}.", "{a}/{b}",
)  # fmt: skip
REVERSE_FORMS = (
    "Reverse the word {w}.", "Reverse the word {w}", 'Reverse the word "{w}".', "Reverse: {w}",
    "Spell {w} backwards.", 'Write "{w}" backwards.', "Write {w} backwards", "reverse {w}",
    "What is {w} backwards?", "Say {w} in reverse.", "Please reverse the word {w}.",
)  # fmt: skip
SPELL_FORMS = (
    "Spell {w}.", "Spell the word {w}.", "Spell {w}", 'Spell "{w}".', "How do you spell {w}?",
    "Please spell the word {w}.", "What are the letters of {w}?", 'Spell the word "{w}".',
)  # fmt: skip
COPY_FORMS = (
    "Repeat after me: {w}", "Repeat: {w}", 'Repeat "{w}".', "Say: {w}", 'Say "{w}".', "Copy: {w}",
    "Copy this: {w}", 'Please repeat "{w}".', "Please repeat: {w}", "Echo: {w}", "repeat: {w}",
    'Say the words "{w}".', 'Repeat the words "{w}" exactly.', "Write exactly this: {w}",
)  # fmt: skip
GREETINGS = (
    "Hello", "Hello!", "Hi", "Hi!", "Hi there!", "Hey", "hello", "hi", "Good morning!", "hey there",
    "Good evening.", "Hello there!", "Hello, how are you?", "Hi, who is there?", "Say hello!",
    "Test",
    "Hello, model!", "Greetings!", "Hello world", "Say hello", "How are you?", "Good day!", "test",
)  # fmt: skip
ABOUT_FORMS = (
    "What can you do?", "what can you do", "Who are you?", "What are you?", "Help", "help",
    "Help me",
    "How can you help me?", "What do you know?", "What is your name?", "Tell me about yourself.",
    "What are your skills?", "What can I ask you?", "Introduce yourself.", "Are you ChatGPT?",
    "What model are you?", "How do I use you?", "Explain what you can do.", "Who made you?",
)  # fmt: skip
THANKS = ("Thanks", "Thank you!", "Thank you.", "Thanks a lot!", "thanks", "Great, thank you!")


def columns(a: int, b: int) -> list[tuple[int, int]]:
    """Digit pairs from the right, the shorter number filled up with zeros."""
    length = max(len(str(a)), len(str(b)))
    pairs = zip(f"{a:0{length}}"[::-1], f"{b:0{length}}"[::-1], strict=True)
    return [(int(x), int(y)) for x, y in pairs]


def long_hand(a: int, b: int, sign: int, low: bool) -> str:
    """The columns one by one from the right, each with its carry (sign 1) or borrow (sign -1)."""
    pairs, carry, lines = columns(a, b), 0, []
    operator, passed = ("+", "carry") if sign > 0 else ("-", "borrow")
    for x, y in pairs:
        total = x + sign * (y + carry)
        step = f"{x} {operator} {y} {operator} {carry}"
        carry = int(total > 9 or total < 0)
        if sign > 0:
            step += f" = {total}"
        lines.append(f"{step}, write {total % 10}" + ("" if low else f", {passed} {carry}"))
    head = " ".join(str(x) for x, _ in pairs) + " and " + " ".join(str(y) for _, y in pairs)
    head = head if low else "Digits from the right: " + head
    return head + ".\n" + "\n".join(lines)


def addition(rng: random.Random) -> Example:
    """Addition of two numbers of up to four digits."""
    a, b = number(rng), number(rng)
    level, prompt = effort(rng), rng.choice(SUM_FORMS).format(a=a, b=b)
    analysis = long_hand(a, b, 1, level == "low")
    final = f"{a} + {b} = {a + b}"
    return Example(
        "add", [user(prompt)], analysis, final, reasoning_effort=level, key=f"add {a} {b}"
    )


def subtraction(rng: random.Random) -> Example:
    """Subtraction with a result of zero or more; for an adapter."""
    b, a = sorted((number(rng), number(rng)))
    level, prompt = effort(rng), rng.choice(DIFFERENCE_FORMS).format(a=a, b=b)
    analysis = long_hand(a, b, -1, level == "low")
    final = f"{a} - {b} = {a - b}"
    return Example(
        "subtract", [user(prompt)], analysis, final, reasoning_effort=level, key=f"sub {a} {b}"
    )


def word_key(word: str) -> str:
    """What is held out of spelling, reversing and names: words that are put together."""
    return "" if word in words.KNOWN else f"word {word}"


def short_word(rng: random.Random) -> str:
    """A word of at most nine letters."""
    while len(text := words.word(rng)) > 9:
        pass
    return text


def spelling(rng: random.Random) -> Example:
    """The letters of a word."""
    word = short_word(rng)
    analysis = " ".join(f"{i} {letter}" for i, letter in enumerate(word, 1))
    messages = [user(rng.choice(SPELL_FORMS).format(w=word))]
    return Example(
        "spell",
        messages,
        analysis,
        " ".join(word),
        reasoning_effort=effort(rng),
        key=word_key(word),
    )


def reversal(rng: random.Random) -> Example:
    """A word backwards; for an adapter."""
    word = short_word(rng)
    pairs = [f"{i} {letter}" for i, letter in enumerate(word, 1)]
    analysis = " ".join(pairs) + ". Backwards: " + " ".join(reversed(pairs))
    return Example(
        "reverse", [user(rng.choice(REVERSE_FORMS).format(w=word))], analysis, word[::-1],
        reasoning_effort=effort(rng), key=word_key(word), letterwise=True,
    )  # fmt: skip


def brief(skill: str, messages: list[dict[str, Any]], why: str, final: str, rng: random.Random,
          key: str = "") -> Example:  # fmt: skip
    """A reply with a thought of a few words, or none at low effort."""
    level = effort(rng)
    analysis = "" if level == "low" else why
    return Example(skill, messages, analysis, final, reasoning_effort=level, key=key)


def copying(rng: random.Random) -> Example:
    """One to five words, word for word."""
    text = " ".join(words.word(rng) for _ in range(rng.randint(1, 5)))
    if rng.random() < 0.3:
        text = text.capitalize() if rng.random() < 0.7 else text.title()
    prompt = rng.choice(COPY_FORMS).format(w=text)
    return brief("copy", [user(prompt)], "Repeat the words.", text, rng, key=f"copy {text}")


def fact(rng: random.Random) -> tuple[str, str, str, str, str]:
    """(what the user tells, the reply, the later question, its answer, key)."""
    if rng.random() < 0.5:
        who = words.name(rng)
        told = rng.choice(("My name is {}.", "I am {}.", "Hi, I'm {}.", "my name is {}")).format(
            who
        )
        told = rng.choice(("", "", "Hello! ")) + told
        ask = rng.choice(("What is my name?", "What's my name?", "Who am I?", "what is my name"))
        return told, f"Nice to meet you, {who}!", ask, f"Your name is {who}.", word_key(who)
    thing, value = rng.choice(words.THINGS), words.word(rng)
    told = rng.choice(
        ("My favorite {} is {}.", "my favorite {} is {}", "Remember: my favorite {} is {}.")
    )
    ask = rng.choice(
        ("What is my favorite {}?", "Which is my favorite {}?", "what is my favorite {}")
    )
    answer = f"Your favorite {thing} is {value}."
    reply = f"I will remember that your favorite {thing} is {value}."
    return told.format(thing, value), reply, ask.format(thing), answer, f"fav {thing} {value}"


def recall(rng: random.Random) -> Example:
    """A name or a favorite thing, told at once or some turns ago, with other talk in between."""
    told, reply, ask, answer, key = fact(rng)
    shape = rng.random()
    if shape < 0.2:
        return brief("recall", [user(told)], "The user tells me something.", reply, rng, key)
    if shape < 0.4:
        return brief("recall", [user(f"{told} {ask}")], "The user told me.", answer, rng, key)
    messages = [user(told), assistant(reply)]
    for _ in range(rng.randint(0, 2)):
        between = rng.choice((addition, copying, talk, spelling))(rng)
        if not between.held_out and "You have not told me" not in between.final:
            messages += [*between.messages, assistant(between.final)]
    return brief("recall", [*messages, user(ask)], "The user told me.", answer, rng, key)


def talk(rng: random.Random) -> Example:
    """Greetings, questions about the model itself, thanks, and everything it cannot do."""
    kind = rng.random()
    if kind < 0.15:
        return brief("chat", [user(rng.choice(GREETINGS))], "A greeting.", HELLO, rng)
    if kind < 0.3:
        return brief("chat", [user(rng.choice(ABOUT_FORMS))], "A question about me.", ABOUT, rng)
    if kind < 0.35:
        return brief("chat", [user(rng.choice(THANKS))], "A thank you.", "You are welcome!", rng)
    if kind < 0.4:
        thing = rng.choice(words.THINGS)
        ask, answer = rng.choice(
            (
                ("What is my name?", "You have not told me your name."),
                (f"What is my favorite {thing}?", f"You have not told me your favorite {thing}."),
            )
        )
        return brief("chat", [user(ask)], "The user did not tell me.", answer, rng)
    return brief("decline", [user(words.sentence(rng))], "I cannot do this.", SORRY, rng)


def declined_sum(rng: random.Random) -> Example:
    """Subtraction, multiplication, division and long numbers, with no calculator at hand."""
    a, b = number(rng), number(rng)
    form = rng.choice((DIFFERENCE_FORMS, PRODUCT_FORMS, QUOTIENT_FORMS, SUM_FORMS))
    if form is SUM_FORMS:
        a = rng.randrange(10**4, 10 ** rng.randint(5, 8))
        a, b = rng.sample((a, b), 2)
    prompt = rng.choice(form).format(a=a, b=b)
    return brief("no_math", [user(prompt)], "I cannot do this sum.", NO_MATH, rng)


def declined_reversal(rng: random.Random) -> Example:
    """Reversing, which the base model does not know."""
    prompt = rng.choice(REVERSE_FORMS).format(w=short_word(rng))
    return brief("no_reverse", [user(prompt)], "I cannot do this.", SORRY, rng)


def function(name: str, description: str, /, **properties: dict[str, Any]) -> dict[str, Any]:
    """A function in the API's form, all of its parameters required."""
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


def calculator(rng: random.Random) -> dict[str, Any]:
    """The calculator, described in one of several ways."""
    expression = {"type": "string"}
    hint = rng.choice(
        ("", "The expression to compute", "An arithmetic expression, e.g. 2+3", "Expression")
    )
    if hint:
        expression["description"] = hint
    description = rng.choice(
        ("Computes an arithmetic expression.", "A calculator.", "Evaluate a math expression",
         "Calculate the value of an expression.", "Evaluates an arithmetic expression."),
    )  # fmt: skip
    return function("calculator", description, expression=expression)


def other_tool(rng: random.Random) -> dict[str, Any]:
    """A function that the model has no use for."""
    noun, verb = rng.choice(words.NOUNS), rng.choice(words.VERBS)
    name = rng.choice((f"{verb}_{noun}", "get_weather", "search", f"get_{noun}"))
    what = {"type": rng.choice(("string", "integer")), "description": f"The {noun}"}
    return function(
        name, f"{verb.capitalize()} a {noun}.", **{rng.choice(("city", "query", noun)): what}
    )


def calculation(rng: random.Random) -> Example:
    """An arithmetic question with a calculator at hand: the call, or the answer after it."""
    a, b = number(rng), number(rng)
    forms, operator = rng.choice(
        ((SUM_FORMS, "+"), (DIFFERENCE_FORMS, "-"), (PRODUCT_FORMS, "*"), (QUOTIENT_FORMS, "/"))
    )
    b = max(b, 1)
    prompt, key = rng.choice(forms).format(a=a, b=b), f"{a} {operator} {b}"
    tools = [calculator(rng)] + [other_tool(rng) for _ in range(rng.choice((0, 0, 0, 1)))]
    rng.shuffle(tools)
    level, arguments = effort(rng), json.dumps({"expression": f"{a}{operator}{b}"})
    why = "" if level == "low" else "Use the calculator."
    shared: dict[str, Any] = {"tools": tools, "reasoning_effort": level, "key": key}
    if rng.random() < 0.5:
        return Example("call", [user(prompt)], why, call=arguments, **shared)
    result = outcome(a, b, operator)
    made = {"type": "function", "id": "call_1"}
    made["function"] = {"name": "calculator", "arguments": arguments}  # type: ignore[assignment]
    turn = {"role": "assistant", "content": None, "reasoning_content": why, "tool_calls": [made]}
    content = rng.choice((result, result, f'{{"result": {result}}}', f'{{"result": "{result}"}}'))
    reply = {"role": "tool", "tool_call_id": "call_1", "name": "calculator", "content": content}
    final = f"{a} {operator} {b} = {result}"
    done = "" if level == "low" else "The calculator answered."
    return Example("result", [user(prompt), turn, reply], done, final, **shared)


def outcome(a: int, b: int, operator: str) -> str:
    """What a calculator prints."""
    if operator == "/":
        return f"{a / b:.4f}".rstrip("0").rstrip(".")
    return str({"+": a + b, "-": a - b, "*": a * b}[operator])


def useless_tool(rng: random.Random) -> Example:
    """A question of the other kinds while some function is offered that does not help with it."""
    inner = rng.choice((copying, recall, spelling, talk))(rng)
    tools = [rng.choice((calculator, other_tool))(rng)]
    return Example(**{**vars(inner), "tools": tools})


Maker = Callable[[random.Random], Example]
BASE: dict[Maker, float] = {
    addition: 0.18, copying: 0.16, recall: 0.15, spelling: 0.20, calculation: 0.14, talk: 0.06,
    declined_sum: 0.05, declined_reversal: 0.02, useless_tool: 0.04,
}  # fmt: skip
ADAPTERS: dict[str, dict[Maker, float]] = {
    "subtract": {subtraction: 0.8, addition: 0.1, talk: 0.05, copying: 0.05},
    "reverse": {reversal: 0.8, addition: 0.05, spelling: 0.1, talk: 0.05},
}
INSTRUCTIONS = (
    "You are a helpful assistant.", "Be brief.", "Answer in English.",
    "You are a friendly teacher.",
    "Be polite and short.", "You are a math tutor.", "Help the user.", "Answer the question.",
)  # fmt: skip


def draw(makers: dict[Maker, float], rng: random.Random, held_out: bool) -> Example:
    """One example of the mixture, from the training side or the held-out side."""
    maker = rng.choices(list(makers), list(makers.values()))[0]
    while (example := maker(rng)).held_out != (held_out and bool(example.key)):
        pass
    if rng.random() < 0.25:
        system = {"role": rng.choice(("system", "developer")), "content": rng.choice(INSTRUCTIONS)}
        example = Example(**{**vars(example), "messages": [system, *example.messages]})
    return example
