"""Jobs over millions of images: folders of parts, continued after a kill, by Ray or in this process.

Needs `pip install 'comask[fleet]'`, imported when a job is opened.
"""
