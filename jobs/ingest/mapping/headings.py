"""Names of columns by what they mean, in the spellings and languages that files have.

Names are compared without regard to case, spaces and punctuation: see `normalize_heading`.
"""

import re
import unicodedata

_CAMEL_CASE = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_SEPARATORS = re.compile(r"[\s_\-./:?!#*\"'()]+")


def normalize_heading(name: str) -> str:
    """The name as it is compared: `Better Response-ID:` is `better_response_id`."""
    spaced = _CAMEL_CASE.sub("_", unicodedata.normalize("NFKC", name[:200]))
    return _SEPARATORS.sub("_", spaced).strip("_").casefold()


def _headings(*names: str) -> frozenset[str]:
    return frozenset(normalize_heading(name) for line in names for name in line.split(","))


INSTRUCTIONS = _headings("instruction,instructions,anweisung,instrucción,instrução,istruzione,инструкция,指令,指示,지시")
QUESTIONS = _headings(
    "question,questions,query,prompt,problem,user prompt,user message,user input,user query,human,q,input text",
    "frage,pregunta,pergunta,domanda,вопрос,питання,问题,問題,提问,質問,질문,السؤال,سؤال,प्रश्न,soru,vraag,pytanie,fråga,spørsmål,spørgsmål",
    "kysymys,otázka,câu hỏi,pertanyaan,întrebare,ερώτηση,שאלה,คำถาม,kérdés",
)
ANSWERS = _headings(
    "answer,answers,response,responses,completion,output,reply,solution,assistant,assistant message,assistant response,model response",
    "gpt,bot,a,output text,target text,expected output,expected answer,ideal response,final answer",
    "antwort,respuesta,réponse,resposta,risposta,ответ,відповідь,答案,回答,答复,回复,答え,応答,답변,대답,응답,الجواب,جواب,الإجابة,إجابة,उत्तर",
    "cevap,yanıt,antwoord,odpowiedź,svar,vastaus,odpověď,trả lời,câu trả lời,jawaban,răspuns,απάντηση,תשובה,คำตอบ,válasz",
)
# Names that mean a question or an answer only together: a column `user` or `source` alone says something else.
PAIRS = (
    ("user", "assistant"),
    ("user", "bot"),
    ("user", "response"),
    ("input", "output"),
    ("input", "response"),
    ("input", "completion"),
    ("input", "answer"),
    ("input", "target"),
    ("source", "target"),
    ("task", "output"),
    ("request", "response"),
    ("prompt", "target"),
    ("question", "target"),
    ("eingabe", "ausgabe"),
    ("entrada", "salida"),
    ("entrada", "saída"),
    ("entrée", "sortie"),
    ("输入", "输出"),
    ("入力", "出力"),
)
# Answers beside a column `prompt` that graders compare with: such rows are prompts.
REFERENCE_ANSWERS = _headings("answer,answers,solution,final answer,expected answer,expected output,a")
INPUTS = _headings("input,context,inputs,eingabe,entrada,entrée,输入,入力")
SYSTEMS = _headings("system,system prompt,system message,system instruction")
HISTORIES = _headings("history,chat history")
TOOLS = _headings("tools,functions,tool definitions,available tools")
CONVERSATIONS = _headings("messages,conversations,conversation,dialog,dialogue,dialogs,chat,turns,message list")
CHOSEN = _headings(
    "chosen,preferred,chosen response,preferred response,chosen answer,preferred output,better response,accepted,winner response"
)
REJECTED = _headings(
    "rejected,dispreferred,rejected response,dispreferred response,rejected answer,non preferred output,worse response,rejected output,"
    "unpreferred,loser response"
)
# Two answers of which another column names the better one: what they begin with, and how they end.
ANSWER_STEMS = _headings("response,answer,output,completion,conversation,reply,assistant,model")
ANSWER_ENDS = (("0", "1"), ("1", "2"), ("a", "b"), ("j", "k"))
PICKERS = _headings(
    "better response id,better response,better,preferred,preference,winner,chosen,choice,best,preferred response,preferred id,label,"
    "safer response id,overall preference,better answer,chosen response"
)
LABELS = _headings(
    "label,kto tag,labels,thumb,thumbs,thumbs up,is good,good,desirable,is desirable,liked,upvoted,is chosen,feedback,human label"
)
TEXTS = _headings(
    "text,content,body,document,story,article,passage,paragraph,raw content,page content,markdown,transcript,lyrics,poem,chapter,"
    "texto,texte,testo,текст,文本,正文,内容,テキスト,본문,metin,tekst,inhalt,contenido"
)
# What makes plain text one half of a pair, which cannot be told from the names alone.
SECOND_HALVES = _headings(
    "label,labels,summary,summaries,highlights,target,class,category,sentiment,translation,headline,abstract,intent,keywords,zusammenfassung,"
    "resumen,résumé,resumo,riassunto,摘要,要約,요약"
)
# Columns that say what is asked, or by whom: rows without them are probably not what was meant.
TELLING = _headings(
    "choices,options,option a,option b,distractors,endings,role,from,speaker,sender",
    "image,images,audio,audios,video,videos,picture,pictures,img,pixel values",
)
NATIVE = ("messages", "text", "prompt", "completion", "chosen", "rejected")
