"""The page of stage=serve: a video, a sentence, and the answers of one or two policies as they are written.

speaker -> answers, token by token; videos -> what visitors brought; drawing -> HTML; page -> Gradio, which nothing else
imports.
"""
