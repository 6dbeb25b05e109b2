"""The runs of `bench behaviour`: what is taken away (`variants`), training and scoring one of them (`runs`), and the
table of all (`table`)."""
